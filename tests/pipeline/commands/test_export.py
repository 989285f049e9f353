"""Tests of `vqvae2 export`."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.commands import export
from stages.errors import UserError
from stages.formats.samples import Samples, open_samples
from stages.formats.shards import open_shards


def run(what: str, out: Path, split: str = "train", count: int = 0) -> None:
    assert export.run(what, out, split=split, count=count) == 0


def test_archive_has_images_and_labels(artifacts, tmp_path: Path):
    """As the evaluation of guided diffusion reads them; a second export has the same bytes."""
    run("samples", tmp_path / "samples.npz")
    samples = open_samples(artifacts.path("samples"))
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as archive:
        assert archive.files == ["arr_0", "arr_1"]
        assert np.array_equal(archive["arr_0"], samples.images(0, samples.count))
        assert np.array_equal(archive["arr_1"], samples.labels) and archive["arr_1"].dtype == np.int64
    run("samples", tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "samples.npz").read_bytes()


def test_folder_has_images_of_one_size(artifacts, tmp_path: Path):
    """Every PNG is an image of the split, with its class in the name."""
    run("images", tmp_path / "validation", split="validation")
    images = open_shards(artifacts.path("shards")).split("validation")
    paths = sorted((tmp_path / "validation").glob("*.png"))
    assert len(paths) == len(images) and all("dark" in path.name or "light" in path.name for path in paths)
    for position, path in enumerate(paths):
        with Image.open(path) as image:
            assert np.array_equal(np.asarray(image), images.read(position))


def test_count_limits_the_images(artifacts, tmp_path: Path):
    """The first ones are written; a larger count than there are images writes all."""
    run("images", tmp_path / "two.npz", count=2)
    run("images", tmp_path / "all.npz", count=1000)
    with np.load(tmp_path / "two.npz") as two, np.load(tmp_path / "all.npz") as images:
        assert len(two["arr_0"]) == 2 and np.array_equal(images["arr_0"][:2], two["arr_0"])
        assert len(images["arr_0"]) == 12


def test_only_exported_samples_are_read(artifacts, tmp_path: Path, monkeypatch):
    """A damaged sample after them does not matter."""
    read: list[int] = []
    original = Samples.read_images

    def read_images(samples: Samples, numbers: Iterable[int]) -> np.ndarray:
        read.extend(numbers)
        return original(samples, numbers)

    monkeypatch.setattr(Samples, "read_images", read_images)
    run("samples", tmp_path / "two.npz", count=2)
    assert read == [0, 1]


@pytest.mark.parametrize(
    ("what", "name", "split", "message"),
    [
        ("codes", "a.npz", "train", "WHAT must be samples, images, model, encoder or decoder, got codes"),
        ("images", "a.npz", "test", "--split must be one of train, validation, got test"),
        ("images", "absent/a.npz", "train", "The folder of a.npz does not exist"),
        ("images", "taken.npz", "train", "taken.npz exists"),
        ("images", "taken", "train", "taken must be a new or empty folder"),
    ],
)
def test_wrong_use_is_refused(artifacts, tmp_path: Path, what: str, name: str, split: str, message: str):
    """Nothing is written, and what is there stays."""
    (tmp_path / "taken").mkdir()
    for path in (tmp_path / "taken.npz", tmp_path / "taken" / "notes.txt"):
        path.write_text("mine")
    with pytest.raises(UserError, match=message):
        run(what, tmp_path / name, split=split)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["notes.txt", "taken.npz"]
