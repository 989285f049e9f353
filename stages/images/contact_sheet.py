"""Sheets of images: many small pictures as one PNG, to be looked at."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

PAPER = 255  # between images: white, so that a sheet reads like a page
SMALLEST_SHOWN = 64  # pixels; smaller images are enlarged by a whole factor, so that no pixel is blurred


def contact_sheet(
    images: np.ndarray | Sequence[np.ndarray], columns: int, *, gap: int = 2, enlarge: int | None = None
) -> bytes:
    """Lay out uint8 images of one size, `(N, H, W, 3)`, row by row on a white page, as a PNG.

    `enlarge` is a whole factor; without one, images smaller than 64 pixels grow to at least that. Floats in [-1, 1]
    are not accepted: see `to_bytes`.
    """
    pictures = np.asarray(images)
    if pictures.ndim != 4 or pictures.shape[-1] != 3 or pictures.dtype != np.uint8:
        raise ValueError(f"images is {pictures.dtype} of shape {pictures.shape}; use uint8 of shape (N, H, W, 3)")
    if columns < 1:
        raise ValueError(f"columns is {columns}; use 1 or more")
    count, height, width, _ = pictures.shape
    factor = enlarge or max(1, -(-SMALLEST_SHOWN // max(1, min(height, width))))
    pictures = pictures.repeat(factor, axis=1).repeat(factor, axis=2)
    height, width = height * factor, width * factor
    rows = max(1, -(-count // columns))
    page = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), PAPER, dtype=np.uint8)
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        top, left = gap + row * (height + gap), gap + column * (width + gap)
        page[top : top + height, left : left + width] = picture
    return png(page)


def png(image: np.ndarray) -> bytes:
    """Encode one uint8 image, `(H, W, 3)`. Equal pixels give equal bytes."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Turn floats in [-1, 1], `(N, 3, H, W)`, into uint8 `(N, H, W, 3)`, rounded; what lies outside is clipped."""
    return np.rint((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)
