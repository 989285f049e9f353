"""Image files in, square RGB pixels out: which files are taken, and what is done to each kind.

Every rule here stands in docs/data.md. Nothing is guessed in silence: what a picture needed is noted, and a picture
that cannot be shown faithfully is rejected with the reason.
"""

import io
import math
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageOps

from stages.config import DatasetConfig

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # what it warns of is refused

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
_ADVICE = "use JPEG, PNG, WebP, BMP, GIF or TIFF"
_OTHERS = {  # first bytes of what people try, to name it in the reason
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


class RejectedImage(Exception):
    """This file is no picture that can be used; the message says why."""


class Decoded(NamedTuple):
    """A square picture, and what had to be done for it."""

    pixels: np.ndarray  # uint8, height x width x RGB
    notes: tuple[str, ...]


def decode(data: bytes, config: DatasetConfig) -> Decoded:
    """Decode one file and fit it to image_size; raise RejectedImage if it cannot be shown faithfully."""
    if not data:
        raise RejectedImage("the file is empty")
    Image.MAX_IMAGE_PIXELS = config.max_pixels  # at twice of which Pillow gives up, and we at once
    notes: list[str] = []
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image, config)
            if getattr(image, "is_animated", False):
                notes.append("several frames: the first is used")
                image.seek(0)
            image.load()  # not verify(), which accepts truncated files
            flat = _flatten(_upright(image, notes), config.background, notes)
        return Decoded(np.asarray(_fit(flat, config, notes)), tuple(notes))
    except RejectedImage:
        raise
    except Image.UnidentifiedImageError:
        raise RejectedImage(_unknown(data)) from None
    except Image.DecompressionBombError:
        raise RejectedImage(f"more than max_pixels, which is {config.max_pixels}") from None
    except Exception as error:  # decoders meet hostile bytes here, and raise whatever they stumble over
        raise RejectedImage(f"cannot be decoded: {error or type(error).__name__}") from None


def encode(pixels: np.ndarray, config: DatasetConfig) -> bytes:
    """Encode uint8 RGB pixels as they are kept in shards."""
    buffer = io.BytesIO()
    if config.image_format == "png":
        Image.fromarray(pixels).save(buffer, "PNG")
    else:
        Image.fromarray(pixels).save(buffer, "JPEG", quality=config.jpeg_quality, subsampling=0)
    return buffer.getvalue()


def _check_size(image: Image.Image, config: DatasetConfig) -> None:
    width, height = image.size  # from the header: nothing is decoded yet
    if width * height > config.max_pixels:
        raise RejectedImage(f"{width} x {height} pixels is more than max_pixels, which is {config.max_pixels}")


def _unknown(data: bytes) -> str:
    head = data[:256].lstrip()
    name = next((name for start, name in _OTHERS.items() if data.startswith(start) or head.startswith(start)), "")
    if data[4:8] == b"ftyp":
        name = "HEIC or AVIF"
    return f"format {name} is not allowed; {_ADVICE}" if name else f"not a readable picture; {_ADVICE}"


def _upright(image: Image.Image, notes: list[str]) -> Image.Image:
    try:
        turned = ImageOps.exif_transpose(image)
    except Exception:  # metadata that cannot be read must not cost the picture
        notes.append("EXIF unreadable: taken as it lies")
        return image
    if image.getexif().get(0x0112, 1) in range(2, 9):  # Orientation
        notes.append("turned upright by EXIF")
    return turned


def _flatten(image: Image.Image, background: str, notes: list[str]) -> Image.Image:
    """Turn any colour mode into RGB on the background."""
    if image.mode in ("I", "F"):
        kind = "32-bit" if image.mode == "I" else "float"
        raise RejectedImage(f"{kind} pixels have no fixed range; save the picture as 8 or 16 bit")
    if image.mode.startswith("I;16"):
        notes.append("16-bit grey: scaled to 8 bit")
        values, clear = np.asarray(image), image.info.get("transparency")
        # convert() would clip at 255. 65535 / 257 is 255.
        image = Image.fromarray(np.rint(values.astype(np.float64) / 257).astype(np.uint8))
        if clear is not None:  # one of the 65,536 values
            image.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    if image.has_transparency_data:
        notes.append("transparency: laid on the background")
        below = Image.new("RGBA", image.size, ImageColor.getrgb(background))
        return Image.alpha_composite(below, image.convert("RGBA")).convert("RGB")
    if image.mode != "RGB":
        notes.append(f"colour mode {image.mode}: converted to RGB")
    return image.convert("RGB")


def _fit(image: Image.Image, config: DatasetConfig, notes: list[str]) -> Image.Image:
    """Make it square by config.resize_mode, each output pixel an antialiased average of its source (Lanczos)."""
    size, (width, height) = config.image_size, image.size
    if min(width, height) < size:
        notes.append("smaller than image_size: enlarged")
    if width != height:
        notes.append(f"not square: {config.resize_mode}")
    if config.resize_mode == "pad":
        scale = size / max(width, height)
        inner = max(1, math.floor(width * scale + 0.5)), max(1, math.floor(height * scale + 0.5))
        square = Image.new("RGB", (size, size), ImageColor.getrgb(config.background)[:3])
        square.paste(image.resize(inner, Image.Resampling.LANCZOS), ((size - inner[0]) // 2, (size - inner[1]) // 2))
        return square
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side) if config.resize_mode == "crop" else (0, 0, width, height)
    return image.resize((size, size), Image.Resampling.LANCZOS, box=box)
