"""Tests of `vqvae2 score`."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vqvae2
from pipeline.commands import score
from stages.errors import UserError
from stages.formats.shards import open_shards


@pytest.fixture
def paths(artifacts, tmp_path: Path) -> list[Path]:
    """Two validation images as files."""
    images = open_shards(artifacts.path("shards")).split("validation")
    paths = [tmp_path / "cat.png", tmp_path / "dog.png"]
    for position, path in enumerate(paths):
        Image.fromarray(images.read(position)).save(path)
    return paths


def test_table_has_the_scores_of_the_python_api(paths: list[Path], tmp_path: Path):
    """The table has a row per image; the line of an image has the same numbers."""
    lines = score.score(paths, tmp_path / "out", class_name="light")
    expected = vqvae2.load().score(paths, labels=["light", "light"])
    with (tmp_path / "out" / score.TABLE).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == list(map(str, paths)) and {row["class"] for row in rows} == {"light"}
    for index, row in enumerate(rows):
        assert float(row["nats"]) == pytest.approx(expected.per_image[index], abs=1e-3)
        assert float(row["top_nats_per_code"]) == pytest.approx(expected.per_level["top"][index], abs=1e-4)
        assert f"{paths[index]}: {expected.per_image[index]:.1f} nats, top " in lines[index]
        assert lines[index].endswith(" per code, light")


def test_picture_shows_the_image_and_its_heat_maps(paths: list[Path], tmp_path: Path):
    """The image, top, bottom and total; brighter where a code is less likely. Equal calls write equal bytes."""
    for name in ("out", "other"):
        score.score(paths, tmp_path / name)
    with Image.open(tmp_path / "out" / "001-dog.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    tiles = np.split(pixels[2:66, 2:].reshape(64, 4, 66, 3)[:, :, :64], 4, axis=1)  # 2 pixels between, 64 each
    assert np.array_equal(tiles[0][::4, 0, ::4], np.asarray(Image.open(paths[1])))
    nats = vqvae2.load().score(paths).maps["top"][1]
    brightness = tiles[1][16::32, 0, 16::32].sum(-1)
    assert np.array_equal(np.argsort(nats, axis=None), np.argsort(brightness, axis=None))
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()


def test_most_probable_class_is_the_default_and_an_unknown_one_is_refused(paths: list[Path], tmp_path: Path):
    """The error lists the classes, and nothing is written."""
    (line,) = score.score(paths[:1], tmp_path / "out")
    model = vqvae2.load()
    assert line.endswith(f", {model.classes[model.score(paths[:1]).labels[0]]}")
    with pytest.raises(UserError, match=r"'gray' is not a valid class[\s\S]*--class[\s\S]*dark, light"):
        score.score(paths, tmp_path / "other", class_name="gray")
    assert not (tmp_path / "other").exists()


def test_files_of_others_are_not_replaced(paths: list[Path], tmp_path: Path):
    """Earlier scores are."""
    for count in (2, 1):
        score.score(paths[:count], tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.png"))) == 1
    with pytest.raises(UserError, match=r"hold only earlier scores; it also holds cat\.png"):
        score.score(paths, tmp_path)
