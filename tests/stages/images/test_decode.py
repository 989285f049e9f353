"""Tests of decoding: each kind of image file, all generated in the tests."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from stages.config import DatasetConfig
from stages.images.decode import RejectedImage, decode, encode

SIZE = 16
RED, BLUE = (255, 0, 0), (0, 0, 255)


def config(**settings) -> DatasetConfig:
    return DatasetConfig(**({"name": "test", "source": ".", "image_size": SIZE} | settings))


def file(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def gradient(width: int = SIZE, height: int = SIZE) -> np.ndarray:
    """Generate smooth pixels without symmetry, (height, width, 3), so that a rotated or flipped copy differs."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // max(1, width - 1), y * 255 // max(1, height - 1), np.full_like(x, 77)], -1).astype("u1")


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """Build a PNG by hand, for formats that Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def rejected(data: bytes, **settings) -> str:
    with pytest.raises(RejectedImage) as caught:
        decode(data, config(**settings))
    return str(caught.value)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF"])
def test_an_image_of_the_right_size_keeps_every_pixel(format):
    """A lossless format at image_size is decoded unchanged, without conversions."""
    decoded = decode(file(Image.fromarray(gradient()), format), config())
    np.testing.assert_array_equal(decoded.pixels, gradient())
    assert decoded.conversions == ()


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "GIF"])
def test_lossy_formats_are_decoded(format):
    """JPEG, WebP and GIF come close to the original."""
    decoded = decode(file(Image.fromarray(gradient()), format), config())
    assert decoded.pixels.shape == (SIZE, SIZE, 3)
    assert np.abs(decoded.pixels.astype(int) - gradient()).mean() < 12


def test_encoding_as_png_is_lossless():
    """PNG keeps every pixel; image_format: jpeg writes JPEG."""
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode(gradient(), config())))), gradient())
    assert Image.open(io.BytesIO(encode(gradient(), config(image_format="jpeg")))).format == "JPEG"


def test_damaged_files_are_rejected():
    """Empty, random, text and truncated files each give a reason."""
    assert rejected(b"") == "the file is empty"
    assert "not a readable image" in rejected(b"hello, I am a text called a.jpg")
    assert "not a readable image" in rejected(bytes(range(256)))
    for format in ("JPEG", "PNG", "WEBP"):
        data = file(Image.fromarray(gradient(200, 200)), format)
        assert rejected(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (b"%!PS-Adobe-3.0", "EPS"),
        (b"8BPS\0\1", "PSD"),
        (b"<svg xmlns=''/>", "SVG"),
        (b"%PDF-1.7", "PDF"),
        (b"\0\0\0\x18ftypheic", "HEIC"),
    ],
)
def test_an_unsupported_format_is_named_in_the_reason(start, name):
    """Files such as EPS, for which Pillow would start Ghostscript, are never opened."""
    assert name in rejected(start + bytes(64)) and "use JPEG, PNG" in rejected(start + bytes(64))


def test_a_format_that_only_pillow_supports_is_rejected():
    """Pillow can open PPM, the project does not allow it."""
    assert "not a readable image" in rejected(file(Image.fromarray(gradient()), "PPM"))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_rejected_by_its_header(tmp_path):
    """20,000 x 20,000 pixels are never decoded: a process grows by less than 20 MB instead of 400 MB."""
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png(20_000, 20_000, 1, 0, bytes(2_501) * 20_000))
    code = """if True:
        import pathlib, resource, sys
        from stages.config import DatasetConfig
        from stages.images.decode import RejectedImage, decode
        data = pathlib.Path(sys.argv[1]).read_bytes()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            decode(data, DatasetConfig("bomb", ".", 16))
        except RejectedImage as reason:
            print(reason)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)  # KiB
    """
    reason, grown = subprocess.check_output([sys.executable, "-c", code, str(bomb)], text=True).splitlines()
    assert "more than max_pixels, which is 100000000" in reason and int(grown) < 20_000
    assert "max_pixels" in rejected(file(Image.fromarray(gradient())), max_pixels=100)
    pixels = SIZE * SIZE
    reason = f"{SIZE} x {SIZE} pixels is more than max_pixels, which is {pixels - 1}"
    assert reason in rejected(file(Image.fromarray(gradient())), max_pixels=pixels - 1)  # Pillow allows twice as many


def test_16_bit_grey_is_scaled_and_not_clipped():
    """A ramp over all 65,536 values becomes 256 even levels, from PNG and TIFF."""
    ramp = np.arange(65_536, dtype=np.uint16).reshape(256, 256)
    for format in ("PNG", "TIFF"):
        decoded = decode(file(Image.fromarray(ramp), format), config(image_size=256))
        np.testing.assert_array_equal(decoded.pixels[..., 0], np.rint(ramp / 257))
        assert "16-bit grey: scaled to 8 bit" in decoded.conversions


def test_16_bit_colour_is_scaled_and_not_clipped():
    """Each channel is within one level of value / 257."""
    values = np.linspace(0, 65_535, SIZE * SIZE * 3).astype(">u2").reshape(SIZE, SIZE, 3)
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    decoded = decode(png(SIZE, SIZE, 16, 2, rows), config())
    assert np.abs(decoded.pixels - values / 257).max() <= 1


def test_float_and_32_bit_pixels_are_rejected():
    """The reason recommends 8 or 16 bit."""
    assert "8 or 16 bit" in rejected(file(Image.fromarray(gradient()[..., 0].astype(np.float32) / 255), "TIFF"))
    assert "8 or 16 bit" in rejected(file(Image.fromarray(gradient()[..., 0].astype(np.int32)), "TIFF"))


@pytest.mark.parametrize("background", ["#ffffff", "#102030"])
def test_transparent_pixels_show_only_the_background(background):
    """Colours under alpha 0 are invisible and half alpha mixes, in RGBA, LA, palette and 16-bit grey images."""
    background_rgb = np.array([int(background[index : index + 2], 16) for index in (1, 3, 5)])
    hidden = np.dstack([gradient(), np.zeros((SIZE, SIZE), "u1")])
    decoded = decode(file(Image.fromarray(hidden)), config(background=background))
    assert (
        decoded.pixels == background_rgb
    ).all() and "transparency: composited on the background" in decoded.conversions
    half = Image.new("LA", (SIZE, SIZE), (0, 128))
    mixed = decode(file(half), config(background=background)).pixels
    assert np.abs(mixed - background_rgb * (127 / 255)).max() <= 1
    palette = Image.new("P", (SIZE, SIZE), 0)
    palette.putpalette([9, 9, 9])
    assert (decode(file(palette, transparency=0), config(background=background)).pixels == background_rgb).all()
    grey = np.full((SIZE, SIZE), 300, np.uint16)
    grey[0] = 301  # the same once there are 8 bits
    data = file(Image.fromarray(grey), transparency=300)
    pixels = decode(data, config(background=background)).pixels
    assert (pixels[1:] == background_rgb).all() and (pixels[0] == 1).all()


def test_other_colour_modes_are_converted_to_rgb():
    """CMYK, palette, bilevel and grey images equal Pillow's own conversion, which is reported."""
    for mode, format in (("CMYK", "JPEG"), ("CMYK", "TIFF"), ("P", "PNG"), ("1", "PNG"), ("L", "JPEG")):
        data = file(Image.fromarray(gradient()).convert(mode), format)
        decoded = decode(data, config())
        np.testing.assert_array_equal(decoded.pixels, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
        assert decoded.conversions == (f"colour mode {mode}: converted to RGB",)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_of_several_frames_is_used(format):
    """A red frame before a blue frame gives red, and the conversion is reported."""
    frames = [Image.new("RGB", (SIZE, SIZE), colour) for colour in (RED, BLUE)]
    lossless = {"lossless": True} if format == "WEBP" else {}
    decoded = decode(file(frames[0], format, save_all=True, append_images=frames[1:], **lossless), config())
    assert (decoded.pixels == RED).all() and "several frames: the first is used" in decoded.conversions


def test_all_eight_exif_orientations_give_the_upright_image():
    """Every orientation of one image decodes to the same pixels."""
    undo = [
        *(None, Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM),
        *(Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_90, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_270),
    ]
    for orientation, operation in enumerate(undo, start=1):
        stored = Image.fromarray(gradient()) if operation is None else Image.fromarray(gradient()).transpose(operation)
        exif = Image.Exif()
        exif[0x0112] = orientation
        decoded = decode(file(stored, exif=exif), config())
        np.testing.assert_array_equal(decoded.pixels, gradient(), err_msg=f"orientation {orientation}")
        assert ("turned upright by EXIF" in decoded.conversions) == (orientation > 1)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_image_with_unreadable_exif_is_not_rejected(monkeypatch):
    """The image is decoded whether Pillow ignores the damaged EXIF or raises an error."""
    data = file(Image.fromarray(gradient()), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert decode(data, config()).pixels.shape == (SIZE, SIZE, 3)
    monkeypatch.setattr("PIL.ImageOps.exif_transpose", lambda image: (_ for _ in ()).throw(SyntaxError("not a TIFF")))
    decoded = decode(data, config())
    assert decoded.pixels.shape == (SIZE, SIZE, 3) and decoded.conversions == ("EXIF unreadable: orientation ignored",)


def test_oblong_images_are_cropped_padded_or_stretched():
    """The left third is red, the middle white, the right blue: each mode shows the expected parts."""
    wide = np.full((SIZE, SIZE * 3, 3), 255, "u1")
    wide[:, :SIZE], wide[:, -SIZE:] = RED, BLUE
    data = file(Image.fromarray(wide))
    middle = decode(data, config(resize_mode="crop"))
    assert (middle.pixels == 255).all() and "not square: crop" in middle.conversions
    padded = decode(data, config(resize_mode="pad", background="#000000")).pixels
    assert (padded[:5] == 0).all() and (padded[-5:] == 0).all() and (padded[8, 1] == RED).all()
    stretched = decode(data, config(resize_mode="stretch")).pixels
    assert (stretched[:, 0] == RED).all() and (stretched[:, -1] == BLUE).all()


@pytest.mark.parametrize("resize_mode", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 7), (SIZE, SIZE + 1)])
def test_images_of_any_size_become_square(resize_mode, size):
    """The smallest and the longest images get image_size pixels a side, and enlarging is reported."""
    decoded = decode(file(Image.new("RGB", size, RED)), config(resize_mode=resize_mode, background="#ff0000"))
    assert decoded.pixels.shape == (SIZE, SIZE, 3) and (decoded.pixels == RED).all()
    assert ("smaller than image_size: enlarged" in decoded.conversions) == (min(size) < SIZE)


def test_shrinking_is_antialiased():
    """A fine chequerboard becomes uniform grey without stripes."""
    board = (np.indices((SIZE * 8, SIZE * 8)).sum(0) % 2 * 255).astype("u1")
    pixels = decode(file(Image.fromarray(board)), config()).pixels.astype(int)
    assert np.abs(pixels - 127.5).max() < 3


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_random_damage_raises_only_rejected_image():
    """Randomly damaged files give an image or a RejectedImage, never another error."""
    generator = np.random.default_rng(0)
    for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        data = np.frombuffer(file(Image.fromarray(gradient()), format), "u1")
        for _ in range(60):
            damaged = data.copy()
            damaged[generator.integers(0, len(data), 5)] = generator.integers(0, 256, 5)
            try:
                assert decode(damaged.tobytes(), config()).pixels.shape == (SIZE, SIZE, 3)
            except RejectedImage as reason:
                assert str(reason)
