"""Files of codes that somebody else has made or damaged: each is named, and no code is taken that is none."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
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
    """Write five rows of codes, changed before the manifest is made, which so agrees."""
    meta = {"levels": {level: grid._asdict() for level, grid in LEVELS.items()}, "classes": [], "vqvae": ""}
    with artifact.commit_folder(folder, codes.KIND, meta) as out:
        keys = [f"{number:09d}" for number in range(5)]
        codes.write_part(out / FILE, LEVELS, CODES, np.full(5, -1), np.zeros(5), keys, {})
        change(out / FILE)
    return codes.open_codes(folder)


def _rewritten(change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    return lambda path: pq.write_table(change(pq.read_table(path)), path, write_page_checksum=True)


def _top(column: pa.Array) -> Callable[[Path], None]:
    return _rewritten(lambda table: table.set_column(table.schema.get_field_index("top"), "top", column))


def _label(column: pa.Array) -> Callable[[Path], None]:
    return _rewritten(lambda table: table.set_column(table.schema.get_field_index("label"), "label", column))


def _cut(part: float) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])


def _grids(value: int, height: int = 2, kind: type = np.uint16) -> pa.Array:
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.full((5, height, 2), value, kind))


class _Foreign(pa.ExtensionType):
    def __init__(self) -> None:
        super().__init__(pa.int32(), "foreign")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""


def test_what_was_written_is_read_back(tmp_path: Path):
    """Every code, and columns of others are no matter."""
    more = _rewritten(lambda table: table.append_column("theirs", pa.array(range(5))))
    for found in (make(tmp_path / "codes"), make(tmp_path / "more", more)):
        read = found.split("train")
        assert read.keys[4] == "000000004" and read.labels.tolist() == [-1] * 5
        for level, grids in CODES.items():
            np.testing.assert_array_equal(read.codes[level], grids)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_cut(0), "cannot be read"),
        (_cut(0.5), "cannot be read"),
        (_cut(0.9), "cannot be read"),
        (lambda path: path.write_bytes(b"<html>404</html>"), "cannot be read"),
        (_rewritten(lambda table: table.drop(["top"])), "Column top holds nothing"),
        (_top(pa.array(range(5))), "Column top holds int64"),
        (_top(_grids(1, kind=np.int64)), "Column top holds .*int64"),
        (_top(_grids(1, height=3)), r"Column top holds .*\[3,2\]"),
        (_top(pa.ExtensionArray.from_storage(_Foreign(), pa.array(range(5), pa.int32()))), "Column top holds int32"),
        (_top(_grids(9)), "Column top holds code 9, but its codebook has 8 entries"),
        (_rewritten(lambda table: table.drop(["label"])), "Column label holds nothing"),
        (_rewritten(lambda table: table.append_column("key", table["key"])), "Column key holds too much"),
        (_label(pa.array(["cat"] * 5)), "Column label holds string, not int32"),
        (_label(pa.nulls(5, pa.int32())), "Column label holds gaps"),
    ],
)
def test_what_are_no_codes_is_refused_by_file(tmp_path: Path, change: Callable[[Path], object], says: str):
    """Also where the manifest agrees; with the command that makes them anew."""
    found = make(tmp_path / "codes", change)
    with pytest.raises(UserError, match=says) as caught:
        found.split("train")
    assert caught.value.where.endswith(FILE) and caught.value.fix and caught.value.code == 4


def test_a_split_without_rows_is_empty(tmp_path: Path):
    """And of the right shape."""
    read = make(tmp_path / "codes", _rewritten(lambda table: table.slice(0, 0))).split("train")
    assert len(read) == 0 and read.codes["bottom"].shape == (0, 4, 4)


def test_a_split_that_is_not_there_is_named(tmp_path: Path):
    """With the command that makes codes of the shards as they are."""
    with pytest.raises(UserError, match=r"There are no codes of split 'test'\.") as caught:
        make(tmp_path / "codes").split("test")
    assert caught.value.where == str(tmp_path / "codes") and "--stage codes" in caught.value.fix
