"""Pictures of the report page: contact sheets, embedded as data.

Axes: N images, H rows, W columns.
"""

import base64
import io
from typing import NamedTuple

import numpy as np
from PIL import Image

from stages.images.contact_sheet import contact_sheet

COLUMNS = 8  # of a contact sheet
MAX_SIDE = 96  # pixels of an embedded image; larger ones are reduced on the page, and complete in the PNG files
JPEG_ABOVE_SIDE = 32  # pixels; lists of many larger images are embedded as JPEG, a few times smaller than PNG
JPEG_QUALITY = 85
LIST_SIDE, LIST_COLUMNS = 64, 16  # of a list of many images
MAX_ENTRIES = 1024  # of a codebook, on the page


class Picture(NamedTuple):
    """An embedded image."""

    caption: str
    url: str  # data:
    alt_text: str
    width: int  # pixels on the page, where there is room
    height: int


def picture(caption: str, images: np.ndarray, alt_text: str, columns: int = COLUMNS) -> Picture:
    """Embed images (N, H, W, 3) as a contact sheet in PNG, reduced to MAX_SIDE."""
    return _embed(caption, contact_sheet(reduce(images, MAX_SIDE), min(columns, len(images))), alt_text, scale=1)


def picture_list(caption: str, images: np.ndarray, alt_text: str) -> Picture:
    """Embed many images (N, H, W, 3) as a contact sheet, reduced to LIST_SIDE, as JPEG unless they are small."""
    images = reduce(images, LIST_SIDE)
    png = contact_sheet(images, min(LIST_COLUMNS, len(images)), gap=1, enlarge=1)
    scale = max(1, LIST_SIDE // max(images.shape[1:3]))
    return _embed(caption, png, alt_text, scale=scale, jpeg=max(images.shape[1:3]) > JPEG_ABOVE_SIDE)


def codebook_picture(level: str, images: np.ndarray, used: int) -> Picture:
    """Embed the decoded entries (N, H, W, 3) of a level, the most used first."""
    count, shown = len(images), images[:MAX_ENTRIES]
    columns = 32 if len(shown) > 64 else 16
    png = contact_sheet(reduce(shown, 16), min(columns, len(shown)), gap=1, enlarge=1)
    scale = max(1, 24 // min(shown.shape[1], 16))
    omitted = f"; the first {len(shown)}" if count > len(shown) else ""
    caption = f"Level {level}: {count} entries, {used} of them used in training images{omitted}"
    return _embed(caption, png, f"entries of level {level}, each decoded alone, most used first", scale=scale)


def reduce(images: np.ndarray, side: int) -> np.ndarray:
    """Reduce images by a whole factor, so that no side is larger than `side`."""
    factor = -(-max(images.shape[1:3]) // side)  # rounded up
    if factor == 1:
        return images
    return np.stack([np.asarray(Image.fromarray(image).reduce(factor)) for image in images])


def _embed(caption: str, png: bytes, alt_text: str, *, scale: int, jpeg: bool = False) -> Picture:
    data, kind = png, "png"
    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        width, height = image.size
        if jpeg:
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "JPEG", quality=JPEG_QUALITY, optimize=True)
            data, kind = buffer.getvalue(), "jpeg"
    url = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return Picture(caption, url, alt_text, width * scale, height * scale)
