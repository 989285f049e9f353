"""Files of an evaluation's parts and features."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from stages.evaluation.part_files import FeatureFile, feature_name, load_or_compute, part_path, write_features
from stages.formats import artifact

COUNTS = [5, 3]  # rows that each part computed


@pytest.fixture
def part_files(tmp_path: Path) -> list[Path]:
    """Write the files of two parts with features."""
    paths, start = [], 0
    for count in COUNTS:
        part = {"task": "features", "start": start, "stop": start + count, "weight": count}
        paths.append(part_path(tmp_path, part))
        features = np.arange(start * 4, (start + count) * 4, dtype=np.float32).reshape(count, 4)
        load_or_compute(paths[-1], lambda features=features: {"features": features, "number": 7})
        start += count
    return paths


@contextmanager
def compiled_sources() -> Iterator[list[Any]]:
    """Collect what Python's parser reads."""
    sources: list[Any] = []
    active = True

    def record_compile(event: str, arguments: tuple[Any, ...]) -> None:
        if active and event == "compile":
            sources.append(arguments[0])

    sys.addaudithook(record_compile)  # cannot be removed
    yield sources
    active = False


def test_parts_come_from_their_files(part_files: list[Path]):
    """A part with a whole file is not computed again, and a damaged one is."""
    assert load_or_compute(part_files[0], lambda: pytest.fail("computed again"))["number"] == 7
    part_files[0].write_bytes(part_files[0].read_bytes()[:-1])
    assert load_or_compute(part_files[0], lambda: {"number": 8}) == {"number": 8}


def test_features_of_parts_become_one_array(part_files: list[Path], tmp_path: Path):
    """Slices are rows of all parts in order; a shorter set is its first rows."""
    name = feature_name("network", "train")
    write_features(tmp_path / "features", {name: part_files})
    assert set(artifact.read(tmp_path / "features", "features").files) == {name}
    expected = np.arange(32, dtype=np.float32).reshape(8, 4)
    complete, short = FeatureFile(tmp_path / "features" / name), FeatureFile(tmp_path / "features" / name, 6)
    assert complete.shape == (8, 4) and short.shape == (6, 4)
    for rows in (slice(None), slice(4, 7), slice(5, 99), slice(3, 3), slice(8, 9)):
        np.testing.assert_array_equal(complete[rows], expected[rows])
        np.testing.assert_array_equal(short[rows], expected[:6][rows])
    assert load_file(tmp_path / "features" / name).keys() == {"features"}
    with pytest.raises(ValueError, match="step of 2"):
        complete[::2]


def test_features_of_a_missing_part_are_noticed(part_files: list[Path], tmp_path: Path):
    """The name of the last part tells the number of rows of all."""
    with pytest.raises(ValueError, match="must have 8 rows, got 3"):
        write_features(tmp_path / "features", {feature_name("network", "train"): part_files[1:]})
    assert not (tmp_path / "features").exists()


def test_files_are_read_without_the_parser_of_python(part_files: list[Path], tmp_path: Path):
    """Threads read these files at once, and the parser of Python 3.11 fails at random in several threads."""
    name = feature_name("network", "train")
    write_features(tmp_path / "features", {name: part_files})
    np.save(tmp_path / "other.npy", np.zeros(3))

    def read() -> None:
        load_or_compute(part_files[0], lambda: {})
        FeatureFile(tmp_path / "features" / name)[2:7]

    read()  # imports what it needs
    with compiled_sources() as sources:
        read()
        assert not sources
        np.load(tmp_path / "other.npy")
        assert sources  # the audit works
