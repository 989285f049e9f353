"""Contact sheet: a grid of images as one PNG.

Axes: N images, H rows, W columns, 3 RGB channels.
"""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

BACKGROUND = 255  # white, as the page of a report
MIN_SHOWN_PIXELS = 64  # smaller images are enlarged by a whole factor, which blurs no pixel
MAX_PAGE_PIXELS = 4_000_000  # larger pages are reduced: at 1024 x 1024 pixels, a page would have a hundred megabytes


def contact_sheet(
    images: np.ndarray | Sequence[np.ndarray], columns: int, *, gap: int = 2, enlarge: int | None = None
) -> bytes:
    """Arrange uint8 images of one size, (N, H, W, 3), row by row on a white page; return it as PNG.

    `gap` is the number of pixels between images. `enlarge` is a whole factor; by default, images with a side below
    MIN_SHOWN_PIXELS are enlarged to at least that, and all are reduced if the page would exceed MAX_PAGE_PIXELS.
    Raises ValueError if `images` has another dtype or shape (convert floats with `to_uint8`), or if `columns` is
    below 1.
    """
    grid = np.asarray(images)
    if grid.ndim != 4 or grid.shape[-1] != 3 or grid.dtype != np.uint8:
        raise ValueError(f"images must be uint8 of shape (N, H, W, 3), got {grid.dtype} of shape {grid.shape}")
    if columns < 1:
        raise ValueError(f"columns must be 1 or more, got {columns}")
    count, height, width, _ = grid.shape
    rows = max(1, -(-count // columns))
    factor = enlarge or max(1, -(-MIN_SHOWN_PIXELS // max(1, min(height, width))))  # rounded up
    if enlarge is None and factor == 1:
        grid = _reduce_to_fit(grid, rows, columns, gap)
    grid = grid.repeat(factor, axis=1).repeat(factor, axis=2)
    height, width = grid.shape[1:3]
    page = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), BACKGROUND, dtype=np.uint8)
    for number, image in enumerate(grid):
        row, column = divmod(number, columns)
        top, left = gap + row * (height + gap), gap + column * (width + gap)
        page[top : top + height, left : left + width] = image
    return encode_png(page)


def _reduce_to_fit(grid: np.ndarray, rows: int, columns: int, gap: int) -> np.ndarray:
    """Average blocks of pixels of each image, by the smallest whole factor with which the page is small enough."""
    height, width = grid.shape[1:3]
    factor = 1
    while factor < min(height, width) and (
        (rows * (height // factor + gap) + gap) * (columns * (width // factor + gap) + gap) > MAX_PAGE_PIXELS
    ):
        factor += 1
    if factor == 1:
        return grid
    return np.stack([np.asarray(Image.fromarray(image).reduce(factor)) for image in grid])


def encode_png(image: np.ndarray) -> bytes:
    """Encode one uint8 image, (H, W, 3), as PNG. Equal pixels give equal bytes."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
