"""Tests of `vqvae2 restore`."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vqvae2
from pipeline.commands import restore
from stages.errors import UserError
from stages.formats.shards import open_shards


@pytest.fixture
def path(artifacts, tmp_path: Path) -> Path:
    """A validation image as a file."""
    image = open_shards(artifacts.path("shards")).split("validation").read(0)
    Image.fromarray(image).save(tmp_path / "cat.png")
    return tmp_path / "cat.png"


def read_tiles(picture: Path) -> np.ndarray:
    """Return the three images of a picture, (3, 16, 16, 3)."""
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB"))
    return pixels[2:66, 2:].reshape(64, 3, 66, 3)[::4, :, :64:4].swapaxes(0, 1)


def test_picture_shows_image_reconstruction_and_restored_image(path: Path, tmp_path: Path):
    """These of the Python API; the line counts the codes that differ."""
    (line,) = restore.restore([path], tmp_path / "out", threshold=1.5, seed=3, class_name="light")
    model = vqvae2.load()
    codes = model.encode(path)
    restored = model.restore_codes(codes, threshold=1.5, seed=3, labels=["light"])
    image, reconstruction, restored_image = read_tiles(tmp_path / "out" / "000-cat.png")
    assert np.array_equal(image, np.asarray(Image.open(path)))
    assert np.array_equal(reconstruction, model.decode(codes, format="numpy")[0])
    assert np.array_equal(restored_image, model.decode(restored, format="numpy")[0])
    top, bottom = ((codes[level] != restored[level]).sum() for level in ("top", "bottom"))
    assert line == f"{path}: {top} of 4 top and {bottom} of 16 bottom codes changed"


def test_high_threshold_changes_nothing(path: Path, tmp_path: Path):
    """The restored image is the reconstruction."""
    (line,) = restore.restore([path], tmp_path / "out", threshold=1000.0)
    assert line.endswith(": 0 of 4 top and 0 of 16 bottom codes changed")
    _, reconstruction, restored_image = read_tiles(tmp_path / "out" / "000-cat.png")
    assert np.array_equal(reconstruction, restored_image)


def test_unknown_class_is_refused(path: Path, tmp_path: Path):
    """The error lists the classes, and nothing is written."""
    with pytest.raises(UserError, match=r"'gray' is not a valid class[\s\S]*dark, light"):
        restore.restore([path], tmp_path / "out", class_name="gray")
    assert not (tmp_path / "out").exists()
