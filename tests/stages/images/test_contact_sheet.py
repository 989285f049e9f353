"""Tests of contact sheets and of the conversion between bytes and floats."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from stages.images.contact_sheet import contact_sheet
from stages.images.tensors import to_float, to_uint8


def _page(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_images_are_laid_out_row_by_row_with_unchanged_pixels():
    """With three columns, the fourth image starts the second row."""
    images = np.random.default_rng(0).integers(0, 256, (4, 5, 7, 3), dtype=np.uint8)
    page = _page(contact_sheet(images, 3, gap=1, enlarge=1))
    assert page.shape == (2 * 6 + 1, 3 * 8 + 1, 3)
    assert (page[1:6, 17:24] == images[2]).all()
    assert (page[7:12, 1:8] == images[3]).all()
    assert (page[7:12, 9:] == 255).all()


def test_small_images_are_enlarged_by_a_whole_factor():
    """An image of 32 pixels is shown at 64 pixels, each pixel doubled."""
    image = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(1, 32, 32, 3)
    page = _page(contact_sheet(image, 1, gap=0))
    assert (page[::2, ::2] == image[0]).all() and (page[1::2, 1::2] == image[0]).all()


def test_a_large_page_is_reduced_to_four_megapixels():
    """Blocks of pixels are averaged; a page that is small enough keeps its pixels."""
    images = np.zeros((8, 1024, 1024, 3), dtype=np.uint8)
    images[:, ::2] = 100
    page = _page(contact_sheet(images, 4))
    assert page.shape == (2 * (512 + 2) + 2, 4 * (512 + 2) + 2, 3)
    assert page[:, :, 0].size <= 4_000_000 and (page[2:514, 2:514] == 50).all()
    assert _page(contact_sheet(images[:3], 3)).shape == (1028, 3 * 1026 + 2, 3)


def test_equal_images_give_equal_bytes():
    """The PNG depends only on the pixels."""
    images = np.zeros((2, 8, 8, 3), dtype=np.uint8)
    assert contact_sheet(images, 2) == contact_sheet(images.copy(), 2)


def test_floats_are_rejected():
    """The error names the dtype and the shape instead of drawing noise."""
    with pytest.raises(ValueError, match=r"must be uint8 .*got float64 of shape \(1, 3, 4, 4\)"):
        contact_sheet(np.zeros((1, 3, 4, 4)), 1)


def test_uint8_survives_conversion_to_float_and_back():
    """All 256 values are preserved."""
    images = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    assert (to_uint8(to_float(torch.from_numpy(images), torch.device("cpu")).numpy()) == images).all()
