"""Codes as one table: rows, a pandas data frame or an Arrow table, with the shape of every grid.

Axes: N rows, H x W codes of a level.
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from stages.errors import UserError
from stages.formats.artifact import MANIFEST
from stages.formats.codes import Codes, CodeSet, concatenate, open_codes

if TYPE_CHECKING:
    import pandas

FOLDER = Path("artifacts/codes")  # of a project


class CodeTable:
    """Codes of all images, one row per image and copy, in memory from the first use on.

    A row has the columns split, key, copy, label, class if the images have classes, and one column per level: a grid,
    (H, W) uint16.
    """

    def __init__(self, dataset: Codes) -> None:
        self.dataset = dataset
        self.levels, self.classes, self.splits = dict(dataset.levels), dataset.classes, dataset.splits

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield each row as a mapping of columns."""
        columns = self._columns
        for values in zip(*columns.values(), strict=True):
            yield {name: _plain(value) for name, value in zip(columns, values, strict=True)}

    def __getitem__(self, column: str) -> np.ndarray:
        """Return a column; of a level, (N, H, W). Raises KeyError for a name that is no column."""
        return self._columns[column]

    def __repr__(self) -> str:
        return (
            f"<vqvae2.CodeTable {self.dataset.artifact.folder}: {', '.join(self.splits)} of {', '.join(self.levels)}>"
        )

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return list(self._columns)

    def to_pandas(self) -> "pandas.DataFrame":
        """Return a data frame whose cells of a level are grids, (H, W)."""
        import pandas

        columns = {name: list(values) if name in self.levels else values for name, values in self._columns.items()}
        return pandas.DataFrame(columns)

    def to_arrow(self) -> pa.Table:
        """Return an Arrow table whose levels are fixed-shape tensors."""
        return pa.table(
            {
                name: pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(values))
                if name in self.levels
                else pa.array(values)
                for name, values in self._columns.items()
            }
        )

    @cached_property
    def _by_split(self) -> dict[str, CodeSet]:
        return {split: self.dataset.split(split) for split in self.splits}

    @cached_property
    def _rows(self) -> CodeSet:
        return concatenate(list(self._by_split.values()))

    @cached_property
    def _columns(self) -> dict[str, np.ndarray]:
        rows = self._rows
        counts = [len(codes) for codes in self._by_split.values()]
        columns = {
            "split": np.repeat(np.array(self.splits, dtype=object), counts),
            "key": np.array(rows.keys, dtype=object),
            "copy": rows.copies,
            "label": rows.labels,
        }
        if self.classes:
            columns["class"] = np.array([*self.classes, None], dtype=object)[rows.labels]  # label -1: no class
        return {**columns, **rows.codes}


def open_code_table(folder: Path) -> CodeTable:
    """Open a folder of codes, or of the artifacts that hold one. Raises UserError if it is missing or incomplete."""
    inner = folder / "codes"
    if not folder.is_dir() and folder != FOLDER:
        raise UserError(
            f"{folder} does not exist.",
            where=folder.absolute(),
            fix="Name the folder of the codes of a project: PROJECT/artifacts/codes",
            code=4,
        )
    dataset = open_codes(inner if inner.is_dir() and not (folder / MANIFEST).exists() else folder)
    if not dataset.splits:
        raise UserError("The folder holds no codes.", where=folder, fix="Run: vqvae2 run --stage codes", code=4)
    return CodeTable(dataset)


def _plain(value: Any) -> Any:
    """Convert a NumPy number to a Python one."""
    return value.item() if isinstance(value, np.generic) else value
