"""Tests of `vqvae2 complete`."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vqvae2
from pipeline.commands import complete
from stages.errors import UserError
from stages.formats.shards import open_shards


@pytest.fixture
def path(artifacts, tmp_path: Path) -> Path:
    """A validation image as a file."""
    image = open_shards(artifacts.path("shards")).split("validation").read(0)
    Image.fromarray(image).save(tmp_path / "cat.png")
    return tmp_path / "cat.png"


def test_images_are_those_of_the_python_api(path: Path, tmp_path: Path):
    """Their codes share the kept rows with those of the image; a second call replaces the first."""
    for seed in (2, 3):
        complete.complete(path, tmp_path / "out", rows=0.5, count=3, seed=seed, class_name="light")
    model = vqvae2.load()
    codes = model.encode(path)
    completed = model.complete_codes(codes, rows=0.5, count=3, seed=3, label="light")
    for level, grid in codes.items():
        middle = grid.shape[1] // 2
        assert (completed[level][:, :middle] == grid[:, :middle]).all()
    drawn = [np.asarray(Image.open(tmp_path / "out" / f"00{number}.png")) for number in range(3)]
    assert np.array_equal(drawn, model.decode(completed, format="numpy"))
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert names == ["000.png", "001.png", "002.png", "manifest.json", "sheet.png"]


def test_unknown_class_is_refused(path: Path, tmp_path: Path):
    """The error lists the classes, and nothing is written."""
    with pytest.raises(UserError, match=r"'gray' is not a valid class[\s\S]*dark, light"):
        complete.complete(path, tmp_path / "out", class_name="gray")
    assert not (tmp_path / "out").exists()
