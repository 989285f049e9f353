"""Tests of files of codes: round trip, and damaged or foreign files."""

import re
import shutil
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.priors import Grid
from stages.errors import UserError
from stages.formats import artifact, codes

LEVELS = {"top": Grid(8, 2, 2), "bottom": Grid(8, 4, 4)}
CODES = {
    level: np.random.default_rng(0).integers(0, 8, (5, grid.height, grid.width)).astype(np.uint16)
    for level, grid in LEVELS.items()
}
FILE = "train-00000.parquet"


def make(folder: Path, change: Callable[[Path], object] = lambda path: None) -> codes.Codes:
    """Write five rows of codes, and change the file before the manifest is written."""
    meta = {"levels": {level: grid._asdict() for level, grid in LEVELS.items()}, "classes": [], "vqvae": ""}
    with artifact.commit_folder(folder, codes.KIND, meta) as out:
        keys = [f"{number:09d}" for number in range(5)]
        codes.write_codes_file(out / FILE, LEVELS, CODES, np.full(5, -1), np.zeros(5), keys, {})
        change(out / FILE)
    return codes.open_codes(folder)


def _rewritten(change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    return lambda path: pq.write_table(change(pq.read_table(path)), path, write_page_checksum=True)


def _top(column: pa.Array) -> Callable[[Path], None]:
    return _rewritten(lambda table: table.set_column(table.schema.get_field_index("top"), "top", column))


def _label(column: pa.Array) -> Callable[[Path], None]:
    return _rewritten(lambda table: table.set_column(table.schema.get_field_index("label"), "label", column))


def _truncate(fraction: float) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(fraction * path.stat().st_size)])


def _grids(value: int, height: int = 2, kind: type = np.uint16) -> pa.Array:
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.full((5, height, 2), value, kind))


class _Foreign(pa.ExtensionType):
    def __init__(self) -> None:
        super().__init__(pa.int32(), "foreign")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""


def test_written_codes_are_read_back(tmp_path: Path):
    """Every code is equal; other columns are ignored."""
    extra_column = _rewritten(lambda table: table.append_column("extra", pa.array(range(5))))
    for dataset in (make(tmp_path / "codes"), make(tmp_path / "extra", extra_column)):
        read = dataset.split("train")
        assert read.keys[4] == "000000004" and read.labels.tolist() == [-1] * 5
        for level, grids in CODES.items():
            np.testing.assert_array_equal(read.codes[level], grids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_truncate(0), "cannot be read"),
        (_truncate(0.5), "cannot be read"),
        (_truncate(0.9), "cannot be read"),
        (lambda path: path.write_bytes(b"<html>404</html>"), "cannot be read"),
        (_rewritten(lambda table: table.drop(["top"])), "one column top, got 0"),
        (_top(pa.array(range(5))), "Column top must be .*got int64"),
        (_top(_grids(1, kind=np.int64)), "Column top must be .*got .*int64"),
        (_top(_grids(1, height=3)), r"Column top must be .*got .*\[3,2\]"),
        (
            _top(pa.ExtensionArray.from_storage(_Foreign(), pa.array(range(5), pa.int32()))),
            "Column top must be .*got int32",
        ),
        (_top(_grids(9)), "Codes of top must be below 8, its entries, got 9"),
        (_rewritten(lambda table: table.drop(["label"])), "one column label, got 0"),
        (_rewritten(lambda table: table.append_column("key", table["key"])), "one column key, got 2"),
        (_label(pa.array(["cat"] * 5)), "Column label must be int32, got string"),
        (_label(pa.nulls(5, pa.int32())), "Column label must have no missing values, got 5"),
    ],
)
def test_an_invalid_file_of_codes_is_rejected(tmp_path: Path, change: Callable[[Path], object], message: str):
    """The manifest agrees with the file, so only reading detects it; the error has the file and a fix."""
    dataset = make(tmp_path / "codes", change)
    with pytest.raises(UserError, match=message) as caught:
        dataset.split("train")
    assert caught.value.where.endswith(FILE) and caught.value.fix and caught.value.code == 4


def test_a_split_without_rows_is_empty(tmp_path: Path):
    """The arrays have the grid's shape."""
    read = make(tmp_path / "codes", _rewritten(lambda table: table.slice(0, 0))).split("train")
    assert len(read) == 0 and read.codes["bottom"].shape == (0, 4, 4)


def test_a_missing_split_is_named(tmp_path: Path):
    """The error has the command that encodes the shards again."""
    with pytest.raises(UserError, match=r"There are no codes of split 'test'\.") as caught:
        make(tmp_path / "codes").split("test")
    assert caught.value.where == str(tmp_path / "codes") and "--stage codes" in caught.value.fix


def test_documented_code_reads_codes_without_this_project(tmp_path: Path):
    """The code in docs/formats.md gives grids, keys and labels, as `Dataset.from_dict` and pandas take them."""
    page = (Path(__file__).parents[3] / "docs" / "formats.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "columns = {}" in block]
    make(tmp_path / "artifacts" / "codes")
    shutil.copy(tmp_path / "artifacts/codes" / FILE, tmp_path / "artifacts/codes/train-00001.parquet")
    scope: dict = {}
    with chdir(tmp_path):
        exec(code, scope)
    columns = scope["columns"]
    assert columns["bottom"].shape == (10, 4, 4) and columns["bottom"].dtype == np.uint16
    np.testing.assert_array_equal(columns["top"], np.concatenate([CODES["top"]] * 2))
    frame = pandas.DataFrame({name: list(values) for name, values in columns.items()})
    assert frame["key"][9] == "000000004" and frame["top"][9].shape == (2, 2)
