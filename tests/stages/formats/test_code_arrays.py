"""Tests of memory-mapped codes: they equal the codes in Parquet."""

from pathlib import Path

import numpy as np
import pytest

from stages.errors import UserError
from stages.formats import code_arrays
from tests.stages.formats.test_codes import CODES, FILE, LEVELS, make


def test_arrays_equal_the_codes_in_parquet(tmp_path: Path):
    """Grids, labels and copies of every row are equal, and cannot be written to."""
    codes = make(tmp_path / "codes")
    code_arrays.write_arrays(codes, tmp_path / "arrays")
    rows = code_arrays.split_arrays(code_arrays.open_arrays(tmp_path / "arrays", codes), "train", LEVELS)
    expected = codes.split("train")
    for level, grids in CODES.items():
        np.testing.assert_array_equal(rows.codes[level], grids)
        assert type(rows.codes[level][[1, 0]]) is np.ndarray and not rows.codes[level].flags.writeable
    assert (rows.labels == expected.labels).all() and rows.labels.dtype == expected.labels.dtype
    assert (rows.copies == expected.copies).all() and len(rows) == codes.rows("train") == 5


def test_size_of_arrays_is_known_before_they_are_made(tmp_path: Path):
    """Only headers come on top of the numbers."""
    codes = make(tmp_path / "codes")
    code_arrays.write_arrays(codes, tmp_path / "arrays")
    files = code_arrays.open_arrays(tmp_path / "arrays", codes).files
    assert sum(properties["bytes"] for properties in files.values()) == code_arrays.array_bytes(codes) + 128 * 4


def test_a_split_without_rows_has_empty_arrays(tmp_path: Path):
    """The arrays have the grid's shape."""
    from tests.stages.formats.test_codes import _rewritten

    codes = make(tmp_path / "codes", _rewritten(lambda table: table.slice(0, 0)))
    code_arrays.write_arrays(codes, tmp_path / "arrays")
    arrays = code_arrays.open_arrays(tmp_path / "arrays", codes)
    assert code_arrays.split_arrays(arrays, "train", ["bottom"]).codes["bottom"].shape == (0, 4, 4)


def test_arrays_of_other_codes_are_rejected(tmp_path: Path):
    """Folders that are swapped by hand do not train on the wrong codes."""
    code_arrays.write_arrays(make(tmp_path / "codes"), tmp_path / "arrays")
    other = make(tmp_path / "other", lambda path: path.with_name(f"more-{FILE}").write_bytes(b""))
    with pytest.raises(UserError, match="must be of codes"):
        code_arrays.open_arrays(tmp_path / "arrays", other)
