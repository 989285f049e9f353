"""What becomes of each kind of picture. Every file is made here."""

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


def picture(width: int = SIZE, height: int = SIZE) -> np.ndarray:
    """A smooth picture with no symmetry, so that a turned one differs."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // max(1, width - 1), y * 255 // max(1, height - 1), np.full_like(x, 77)], -1).astype("u1")


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG built by hand, for what Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def rejected(data: bytes, **settings) -> str:
    with pytest.raises(RejectedImage) as caught:
        decode(data, config(**settings))
    return str(caught.value)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF"])
def test_a_picture_of_the_right_size_keeps_every_pixel(format):
    """Lossless formats at image_size pass through unchanged, and nothing is noted."""
    decoded = decode(file(Image.fromarray(picture()), format), config())
    np.testing.assert_array_equal(decoded.pixels, picture())
    assert decoded.notes == ()


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "GIF"])
def test_lossy_formats_are_read(format):
    """JPEG, WebP and GIF come close to the original."""
    decoded = decode(file(Image.fromarray(picture()), format), config())
    assert decoded.pixels.shape == (SIZE, SIZE, 3)
    assert np.abs(decoded.pixels.astype(int) - picture()).mean() < 12


def test_png_shards_keep_every_pixel():
    """What encode writes as PNG, any reader gets back."""
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode(picture(), config())))), picture())
    assert Image.open(io.BytesIO(encode(picture(), config(image_format="jpeg")))).format == "JPEG"


def test_damaged_files_are_rejected():
    """Empty, random, textual and truncated files each give a reason."""
    assert rejected(b"") == "the file is empty"
    assert "not a readable picture" in rejected(b"hello, I am a text called a.jpg")
    assert "not a readable picture" in rejected(bytes(range(256)))
    for format in ("JPEG", "PNG", "WEBP"):
        whole = file(Image.fromarray(picture(200, 200)), format)
        assert rejected(whole[: len(whole) // 2])


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
def test_other_formats_are_named_in_the_reason(start, name):
    """EPS would start Ghostscript, and the rest have their own traps: none is opened."""
    assert name in rejected(start + bytes(64)) and "use JPEG, PNG" in rejected(start + bytes(64))


def test_a_format_pillow_knows_but_we_do_not_allow_is_refused():
    """Pillow would open this PPM by itself."""
    assert "not a readable picture" in rejected(file(Image.fromarray(picture()), "PPM"))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_rejected_by_its_header(tmp_path):
    """20,000 x 20,000 pixels are never decoded: a process of its own grows by less than 20 MB, not by 400."""
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
    assert "max_pixels" in rejected(file(Image.fromarray(picture())), max_pixels=100)
    pixels = SIZE * SIZE
    said = f"{SIZE} x {SIZE} pixels is more than max_pixels, which is {pixels - 1}"
    assert said in rejected(file(Image.fromarray(picture())), max_pixels=pixels - 1)  # Pillow allows twice as many


def test_sixteen_bit_grey_keeps_its_levels():
    """A ramp over all 65,536 values becomes the 256 levels evenly, in PNG and TIFF; it is never clipped."""
    ramp = np.arange(65_536, dtype=np.uint16).reshape(256, 256)
    for format in ("PNG", "TIFF"):
        decoded = decode(file(Image.fromarray(ramp), format), config(image_size=256))
        np.testing.assert_array_equal(decoded.pixels[..., 0], np.rint(ramp / 257))
        assert "16-bit grey: scaled to 8 bit" in decoded.notes


def test_sixteen_bit_colour_keeps_its_levels():
    """Each channel comes out within one level of value / 257."""
    values = np.linspace(0, 65_535, SIZE * SIZE * 3).astype(">u2").reshape(SIZE, SIZE, 3)
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    decoded = decode(png(SIZE, SIZE, 16, 2, rows), config())
    assert np.abs(decoded.pixels - values / 257).max() <= 1


def test_pixels_without_a_fixed_range_are_rejected():
    """Float and 32-bit TIFFs get advice instead of a black picture."""
    assert "8 or 16 bit" in rejected(file(Image.fromarray(picture()[..., 0].astype(np.float32) / 255), "TIFF"))
    assert "8 or 16 bit" in rejected(file(Image.fromarray(picture()[..., 0].astype(np.int32)), "TIFF"))


@pytest.mark.parametrize("background", ["#ffffff", "#102030"])
def test_transparent_pixels_show_the_background_only(background):
    """Colours hidden under alpha 0 do not come through; half alpha mixes; in RGBA, LA, a palette, 16-bit grey."""
    below = np.array([int(background[index : index + 2], 16) for index in (1, 3, 5)])
    hidden = np.dstack([picture(), np.zeros((SIZE, SIZE), "u1")])
    decoded = decode(file(Image.fromarray(hidden)), config(background=background))
    assert (decoded.pixels == below).all() and "transparency: laid on the background" in decoded.notes
    half = Image.new("LA", (SIZE, SIZE), (0, 128))
    mixed = decode(file(half), config(background=background)).pixels
    assert np.abs(mixed - below * (127 / 255)).max() <= 1
    palette = Image.new("P", (SIZE, SIZE), 0)
    palette.putpalette([9, 9, 9])
    assert (decode(file(palette, transparency=0), config(background=background)).pixels == below).all()
    grey = np.full((SIZE, SIZE), 300, np.uint16)
    grey[0] = 301  # the same once there are 8 bits
    data = file(Image.fromarray(grey), transparency=300)
    pixels = decode(data, config(background=background)).pixels
    assert (pixels[1:] == below).all() and (pixels[0] == 1).all()


def test_other_colour_modes_become_rgb():
    """CMYK, palette, bilevel and grey come out as Pillow's own conversion, and are counted."""
    for mode, format in (("CMYK", "JPEG"), ("CMYK", "TIFF"), ("P", "PNG"), ("1", "PNG"), ("L", "JPEG")):
        data = file(Image.fromarray(picture()).convert(mode), format)
        decoded = decode(data, config())
        np.testing.assert_array_equal(decoded.pixels, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
        assert decoded.notes == (f"colour mode {mode}: converted to RGB",)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first_is_taken(format):
    """A red frame before a blue one gives red, and a note."""
    frames = [Image.new("RGB", (SIZE, SIZE), colour) for colour in (RED, BLUE)]
    lossless = {"lossless": True} if format == "WEBP" else {}
    decoded = decode(file(frames[0], format, save_all=True, append_images=frames[1:], **lossless), config())
    assert (decoded.pixels == RED).all() and "several frames: the first is used" in decoded.notes


def test_all_eight_exif_orientations_give_the_upright_picture():
    """However the camera was held, the same pixels come out."""
    undo = [
        *(None, Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM),
        *(Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_90, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_270),
    ]
    for orientation, operation in enumerate(undo, start=1):
        stored = Image.fromarray(picture()) if operation is None else Image.fromarray(picture()).transpose(operation)
        exif = Image.Exif()
        exif[0x0112] = orientation
        decoded = decode(file(stored, exif=exif), config())
        np.testing.assert_array_equal(decoded.pixels, picture(), err_msg=f"orientation {orientation}")
        assert ("turned upright by EXIF" in decoded.notes) == (orientation > 1)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_unreadable_exif_does_not_cost_the_picture(monkeypatch):
    """Metadata is no reason to lose an image, whether Pillow passes over it or stumbles."""
    data = file(Image.fromarray(picture()), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert decode(data, config()).pixels.shape == (SIZE, SIZE, 3)
    monkeypatch.setattr("PIL.ImageOps.exif_transpose", lambda image: (_ for _ in ()).throw(SyntaxError("not a TIFF")))
    decoded = decode(data, config())
    assert decoded.pixels.shape == (SIZE, SIZE, 3) and decoded.notes == ("EXIF unreadable: taken as it lies",)


def test_oblong_pictures_are_cropped_padded_or_stretched():
    """Left half red, middle white, right blue: each rule shows what it promises."""
    wide = np.full((SIZE, SIZE * 3, 3), 255, "u1")
    wide[:, :SIZE], wide[:, -SIZE:] = RED, BLUE
    data = file(Image.fromarray(wide))
    middle = decode(data, config(resize_mode="crop"))
    assert (middle.pixels == 255).all() and "not square: crop" in middle.notes
    padded = decode(data, config(resize_mode="pad", background="#000000")).pixels
    assert (padded[:5] == 0).all() and (padded[-5:] == 0).all() and (padded[8, 1] == RED).all()
    stretched = decode(data, config(resize_mode="stretch")).pixels
    assert (stretched[:, 0] == RED).all() and (stretched[:, -1] == BLUE).all()


@pytest.mark.parametrize("resize_mode", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 7), (SIZE, SIZE + 1)])
def test_odd_sizes_come_out_square(resize_mode, size):
    """The smallest and the longest pictures give image_size pixels a side, and say that they were enlarged."""
    decoded = decode(file(Image.new("RGB", size, RED)), config(resize_mode=resize_mode, background="#ff0000"))
    assert decoded.pixels.shape == (SIZE, SIZE, 3) and (decoded.pixels == RED).all()
    assert ("smaller than image_size: enlarged" in decoded.notes) == (min(size) < SIZE)


def test_shrinking_is_antialiased():
    """A fine chequerboard becomes even grey, not stripes."""
    board = (np.indices((SIZE * 8, SIZE * 8)).sum(0) % 2 * 255).astype("u1")
    pixels = decode(file(Image.fromarray(board)), config()).pixels.astype(int)
    assert np.abs(pixels - 127.5).max() < 3


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_bytes_crash_the_decoder():
    """Random damage to real files gives a picture or a reason, and never another error."""
    generator = np.random.default_rng(0)
    for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        whole = np.frombuffer(file(Image.fromarray(picture()), format), "u1")
        for _ in range(60):
            damaged = whole.copy()
            damaged[generator.integers(0, len(whole), 5)] = generator.integers(0, 256, 5)
            try:
                assert decode(damaged.tobytes(), config()).pixels.shape == (SIZE, SIZE, 3)
            except RejectedImage as reason:
                assert str(reason)
