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
MAX_SIDE = 96  # pixels of an embedded image; larger ones are reduced, and whole in the PNG files beside the page
# Lists of larger images are embedded as WebP, which is several times smaller than PNG. JPEG has no transparency.
WEBP_ABOVE_SIDE = 32
WEBP_QUALITY = 85
LIST_SIDE, LIST_COLUMNS = 64, 16  # of a list of many images
MAX_ENTRIES = 1024  # of a codebook, on the page


class Picture(NamedTuple):
    """An embedded image."""

    caption: str
    url: str  # a data: URL
    alt_text: str
    width: int  # pixels on the page, where there is room
    height: int


def picture(caption: str, images: np.ndarray, alt_text: str, columns: int = COLUMNS) -> Picture:
    """Embed images (N, H, W, 3) as a contact sheet in PNG, reduced to MAX_SIDE."""
    sheet = _transparent_sheet(reduce(images, MAX_SIDE), min(columns, len(images)))
    return _embed(caption, sheet, alt_text, scale=1)


def picture_list(caption: str, images: np.ndarray, alt_text: str) -> Picture:
    """Embed many images (N, H, W, 3) as a contact sheet, reduced to LIST_SIDE, as WebP unless they are small."""
    images = reduce(images, LIST_SIDE)
    sheet = _transparent_sheet(images, min(LIST_COLUMNS, len(images)), gap=1, enlarge=1)
    scale = max(1, LIST_SIDE // max(images.shape[1:3]))
    return _embed(caption, sheet, alt_text, scale=scale, lossy=max(images.shape[1:3]) > WEBP_ABOVE_SIDE)


def codebook_picture(level: str, images: np.ndarray, used: int) -> Picture:
    """Embed the decoded entries (N, H, W, 3) of a level, the most used first."""
    count, shown = len(images), images[:MAX_ENTRIES]
    columns = 32 if len(shown) > 64 else 16
    sheet = _transparent_sheet(reduce(shown, 16), min(columns, len(shown)), gap=1, enlarge=1)
    scale = max(1, 24 // min(shown.shape[1], 16))
    omitted = f"; the first {len(shown)}" if count > len(shown) else ""
    caption = f"Level {level}: {count} entries, {used} of them used in training images{omitted}"
    return _embed(caption, sheet, f"entries of level {level}, each decoded alone, most used first", scale=scale)


def reduce(images: np.ndarray, side: int) -> np.ndarray:
    """Reduce images by a whole factor, so that no side is larger than `side`."""
    factor = -(-max(images.shape[1:3]) // side)  # rounded up
    if factor == 1:
        return images
    return np.stack([np.asarray(Image.fromarray(image).reduce(factor)) for image in images])


def _embed(caption: str, sheet: Image.Image, alt_text: str, *, scale: int, lossy: bool = False) -> Picture:
    buffer, kind = io.BytesIO(), "webp" if lossy else "png"
    if lossy:
        sheet.save(buffer, "WEBP", quality=WEBP_QUALITY)
    else:
        sheet.save(buffer, "PNG", optimize=True)
    url = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Picture(caption, url, alt_text, sheet.width * scale, sheet.height * scale)


def _transparent_sheet(images: np.ndarray, columns: int, *, gap: int = 2, enlarge: int | None = None) -> Image.Image:
    """Arrange images as a contact sheet whose gaps show the page, in its light and in its dark theme."""
    sheet, gaps = (
        Image.open(io.BytesIO(contact_sheet(cells, columns, gap=gap, enlarge=enlarge)), formats=["PNG"])
        for cells in (images, np.zeros_like(images))  # black images on a white sheet: what is white are the gaps
    )
    sheet.putalpha(gaps.convert("L").point(lambda value: 255 - value))
    return sheet
