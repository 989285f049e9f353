"""Decoder of image files: bytes to square RGB pixels of one size.

docs/data.md lists every rule. A conversion that changes pixels is reported in `Decoded.conversions`; an image that
cannot be converted faithfully is rejected with a reason.
"""

import io
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageOps

from stages.config import DatasetConfig

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # such images are rejected

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
_USE_FORMATS = "use JPEG, PNG, WebP, BMP, GIF or TIFF"
_UNSUPPORTED_SIGNATURES = {  # first bytes -> format, to name the format in the reason
    b"%!PS": "EPS",
    b"%PDF": "PDF",
    b"8BPS": "PSD",
    b"<svg": "SVG",
    b"<?xml": "SVG",
    b"\x00\x00\x01\x00": "ICO",
    b"\x00\x00\x00\x0cjP": "JPEG 2000",
    b"SIMPLE": "FITS",
    b"\xd7\xcd\xc6\x9a": "WMF",
}
_EXIF_ORIENTATION = 0x0112  # tag; 1 is upright, 2 to 8 are flips and rotations


class RejectedImage(Exception):
    """An image file that cannot be used. The message is the reason."""


class Decoded(NamedTuple):
    """Decoded image, and the conversions that were applied to it."""

    pixels: np.ndarray  # uint8, (image_size, image_size, 3)
    conversions: tuple[str, ...]  # such as "colour mode L: converted to RGB"


class Header(NamedTuple):
    """Properties of an image file that its first bytes state."""

    width: int  # pixels, before EXIF turns the image upright
    height: int
    file_format: str  # such as JPEG
    mode: str  # of Pillow, such as RGB


def read_header(data: bytes, config: DatasetConfig) -> Header:
    """Read the header of an image file, of which `data` may be the first part.

    Raises RejectedImage as `decode` does, and if the header is not complete.
    """
    with _open(data, config) as image:
        return Header(*image.size, str(image.format), image.mode)


def decode(data: bytes, config: DatasetConfig) -> Decoded:
    """Decode one file and fit it to `config.image_size`. Raises RejectedImage if it cannot be converted faithfully."""
    conversions: list[str] = []
    with _open(data, config) as image:
        if getattr(image, "is_animated", False):
            conversions.append("several frames: the first is used")
            image.seek(0)
        image.load()  # verify() would accept truncated files
        rgb = _to_rgb(_upright(image, conversions), config.background, conversions)
        return Decoded(np.asarray(_fit(rgb, config, conversions)), tuple(conversions))


@contextmanager
def _open(data: bytes, config: DatasetConfig) -> Iterator[Image.Image]:
    """Open an image file whose size is allowed; convert the errors of decoders in the block to RejectedImage."""
    if not data:
        raise RejectedImage("the file is empty")
    Image.MAX_IMAGE_PIXELS = config.max_pixels  # Pillow raises at twice this; _check_size rejects at once this
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image, config)
            yield image
    except RejectedImage:
        raise
    except Image.UnidentifiedImageError:
        raise RejectedImage(_unidentified(data)) from None
    except Image.DecompressionBombError:
        raise RejectedImage(f"more than max_pixels, which is {config.max_pixels}") from None
    except Exception as error:  # decoders raise errors of any type on damaged bytes
        raise RejectedImage(f"cannot be decoded: {error or type(error).__name__}") from None


def convert(image: Image.Image, config: DatasetConfig) -> np.ndarray:
    """Convert an open image to pixels as `decode` does. Raises RejectedImage if it cannot be converted faithfully."""
    conversions: list[str] = []
    try:
        _check_size(image, config)
        rgb = _to_rgb(_upright(image, conversions), config.background, conversions)
        return np.asarray(_fit(rgb, config, conversions))
    except RejectedImage:
        raise
    except Exception as error:  # the file behind it may be damaged, and is read on first use
        raise RejectedImage(f"cannot be decoded: {error or type(error).__name__}") from None


def encode(pixels: np.ndarray, config: DatasetConfig) -> bytes:
    """Encode uint8 RGB pixels, (H, W, 3), in the image format of the shards."""
    buffer = io.BytesIO()
    if config.image_format == "png":
        Image.fromarray(pixels).save(buffer, "PNG")
    else:
        Image.fromarray(pixels).save(buffer, "JPEG", quality=config.jpeg_quality, subsampling=0)
    return buffer.getvalue()


def _check_size(image: Image.Image, config: DatasetConfig) -> None:
    width, height = image.size  # from the header, before any pixel is decoded
    if width * height > config.max_pixels:
        raise RejectedImage(f"{width} x {height} pixels is more than max_pixels, which is {config.max_pixels}")


def _unidentified(data: bytes) -> str:
    """Return the reason for bytes that Pillow does not identify."""
    head = data[:256].lstrip()
    signatures = _UNSUPPORTED_SIGNATURES.items()
    name = next((name for start, name in signatures if data.startswith(start) or head.startswith(start)), "")
    if data[4:8] == b"ftyp":
        name = "HEIC or AVIF"
    return f"format {name} is not supported; {_USE_FORMATS}" if name else f"not a readable image; {_USE_FORMATS}"


def _upright(image: Image.Image, conversions: list[str]) -> Image.Image:
    """Apply the EXIF orientation."""
    try:
        upright = ImageOps.exif_transpose(image)
    except Exception:  # unreadable metadata is no reason to reject the pixels
        conversions.append("EXIF unreadable: orientation ignored")
        return image
    if image.getexif().get(_EXIF_ORIENTATION, 1) in range(2, 9):
        conversions.append("turned upright by EXIF")
    return upright


def _to_rgb(image: Image.Image, background: str, conversions: list[str]) -> Image.Image:
    """Convert any colour mode to RGB; composite transparent pixels on the background."""
    if image.mode in ("I", "F"):
        pixel_type = "32-bit" if image.mode == "I" else "float"
        raise RejectedImage(f"{pixel_type} pixels have no fixed range; save the image as 8 or 16 bit")
    if image.mode.startswith("I;16"):
        conversions.append("16-bit grey: scaled to 8 bit")
        values, transparent = np.asarray(image), image.info.get("transparency")
        # Pillow's convert() would clip at 255 instead of scaling; 65535 / 257 = 255.
        image = Image.fromarray(np.rint(values.astype(np.float64) / 257).astype(np.uint8))
        if transparent is not None:  # one 16-bit value: compare before scaling, which merges 257 values
            image.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    if image.has_transparency_data:
        conversions.append("transparency: composited on the background")
        canvas = Image.new("RGBA", image.size, ImageColor.getrgb(background))
        return Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")
    if image.mode != "RGB":
        conversions.append(f"colour mode {image.mode}: converted to RGB")
    return image.convert("RGB")


def _fit(image: Image.Image, config: DatasetConfig, conversions: list[str]) -> Image.Image:
    """Make an image square by `config.resize_mode` and resize it with an antialiased Lanczos filter."""
    size, (width, height) = config.image_size, image.size
    if min(width, height) < size:
        conversions.append("smaller than image_size: enlarged")
    if width != height:
        conversions.append(f"not square: {config.resize_mode}")
    if config.resize_mode == "pad":
        scale = size / max(width, height)
        inner = max(1, math.floor(width * scale + 0.5)), max(1, math.floor(height * scale + 0.5))  # round half up
        square = Image.new("RGB", (size, size), ImageColor.getrgb(config.background)[:3])
        square.paste(image.resize(inner, Image.Resampling.LANCZOS), ((size - inner[0]) // 2, (size - inner[1]) // 2))
        return square
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side) if config.resize_mode == "crop" else (0, 0, width, height)
    return image.resize((size, size), Image.Resampling.LANCZOS, box=box)
