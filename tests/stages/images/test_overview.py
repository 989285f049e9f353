"""Tests of the overview of a source."""

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages.config import DatasetConfig
from stages.images import overview
from stages.images.listing import Listing, list_images
from stages.images.sources import open_source

DATASET = DatasetConfig("test", "images", 16)


def encoded(width: int, height: int, shade: int, file_format: str = "PNG", mode: str = "RGB", **options) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height), shade).save(buffer, file_format, **options)
    return buffer.getvalue()


FILES = {
    "train/cat/1.png": encoded(20, 30, 1),
    "train/cat/2.png": encoded(20, 30, 2, mode="L"),
    "train/dog/3.jpg": encoded(40, 40, 3, "JPEG"),
    "train/dog/4.png": b"no image",
    "val/cat/5.png": encoded(20, 30, 1),  # a copy of 1.png
    "val/cat/6.gif": encoded(8, 8, 4, "GIF"),
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for name, data in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    return tmp_path


def listed(path: Path) -> Listing:
    return list_images(path, "folders", validation_fraction=0.0)


def test_splits_and_classes_are_counted(source):
    """Classes come in order of size; the description has counts, assumptions and doubts."""
    listing = listed(source)
    assert overview.count_splits(listing) == {"train": 4, "validation": 2, "test": 0}
    assert overview.count_classes(listing) == {
        "cat": {"train": 2, "validation": 2, "test": 0},
        "dog": {"train": 2, "validation": 0, "test": 0},
    }
    assert overview.describe(listing) == ["Images: train 4, validation 2.", "Classes (2): cat 4, dog 2."]
    doubt = overview.describe(listing._replace(doubts=("Is it?",)))[-1]
    assert doubt == "DOUBT: Is it?"


def test_headers_give_sizes_formats_and_modes(source):
    """Files that are no images are listed with the reason, and copies of other files are counted."""
    progress = []
    scan = overview.scan(
        open_source(source), listed(source).images, DATASET, progress=lambda done, total: progress.append((done, total))
    )
    assert (scan.checked, scan.num_rejected, scan.copies, scan.leaked) == (6, 1, 1, 1) and scan.copies_checked
    assert overview.quantiles(scan.widths) == (8, 20, 40) and overview.quantiles(scan.heights) == (8, 30, 40)
    assert scan.formats == {"PNG": 3, "JPEG": 1, "GIF": 1} and scan.modes["L"] == 1
    assert (scan.smaller, scan.not_square) == (1, 3)
    assert scan.rejected[0][0] == "train/dog/4.png" and "not a readable image" in scan.rejected[0][1]
    assert scan.first_copies == [("val/cat/5.png", "train/cat/1.png")]
    assert progress[-1] == (6, 6)


def test_a_long_header_is_read_wholly(tmp_path, monkeypatch):
    """Only the first bytes of a file are read unless they do not suffice."""
    comment = encoded(20, 30, 1, "JPEG", comment=b"x" * 50_000, exif=b"Exif\0\0" + bytes(60_000))
    (tmp_path / "1.jpg").write_bytes(comment)
    monkeypatch.setattr(overview, "_HEADER_BYTES", 1000)
    scan = overview.scan(open_source(tmp_path), listed(tmp_path).images, DATASET)
    assert scan.widths == {20: 1} and not scan.rejected


def test_many_equal_sizes_are_not_compared(source, monkeypatch):
    """Reading all files would take long."""
    monkeypatch.setattr(overview, "_MAX_HASHED_BYTES", 10)
    scan = overview.scan(open_source(source), listed(source).images, DATASET)
    assert not scan.copies_checked and scan.copies == 0


def test_a_sample_of_images_keeps_the_shares_of_the_splits(source):
    """Of any number of images; 0 chooses all."""
    images = listed(source).images * 100  # two thirds of them train
    images = tuple(sorted(images, key=lambda image: image.split))
    for count in (3, 60, 301, 400, 599, 600):
        chosen = overview.sample_images(images, count)
        assert len(chosen) == count
        assert abs(Counter(image.split for image in chosen)["train"] - count * 2 / 3) <= 1
    assert overview.sample_images(images, 0) is images is overview.sample_images(images, 1000)


def test_examples_are_converted_as_for_training(source):
    """Images that cannot be decoded are left out."""
    sheets = dict(
        overview.examples(open_source(source), listed(source), DATASET, classes=["cat", "dog"], count=3, side=8)
    )
    assert {name: images.shape for name, images in sheets.items()} == {"cat": (3, 8, 8, 3), "dog": (1, 8, 8, 3)}
    assert sheets["dog"].dtype == np.uint8


def test_the_median_is_a_value():
    """Of an even number of values it is the lower one."""
    assert overview.quantiles(Counter([1, 2, 3, 100])) == (1, 2, 100)
    assert overview.quantiles(Counter([5])) == (5, 5, 5)
