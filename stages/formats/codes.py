"""Codes in Parquet: one row per image and copy, a grid of codes per level.

    {split}-{number:05d}.parquet    one file per shard of the same name
        key      string             the image's key in its shard
        copy     uint16             0: the original image; 1, 2, ...: augmented copies of it
        label    int32              index into the classes; -1 without classes
        <level>  fixed-shape tensor of uint16, H x W, for each level coarse to fine
    manifest.json   meta: levels (entries, grid), classes, and the digest of the VQ-VAE that encoded the images

Codes are dictionary-encoded: Parquet stores one of 512 entries in 9 bits. Every page has a checksum, which is verified
on reading. Plain pyarrow and Ray Data can read the files; see docs/formats.md.

Axes: N rows, H x W grid of codes of a level.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from models.priors import Grid
from stages.errors import UserError
from stages.formats import artifact
from stages.formats.artifact import Artifact

KIND = "codes"
_COLUMNS = {"key": pa.string(), "copy": pa.uint16(), "label": pa.int32()}  # beside one column per level
ROWS_PER_GROUP = 16_384  # each row group stores a dictionary of entries: many rows make its size negligible


@dataclass(frozen=True)
class CodeSet:
    """Codes of N images or copies of images, in memory."""

    codes: Mapping[str, np.ndarray]  # level -> (N, H, W) uint16
    labels: np.ndarray  # (N,) int64, -1 without classes
    copies: np.ndarray  # (N,) uint16
    keys: Sequence[str]  # N

    def __len__(self) -> int:
        return len(self.labels)

    def originals(self) -> "CodeSet":
        """Return the rows of original images, without augmented copies."""
        return self.take(np.flatnonzero(self.copies == 0)) if self.copies.any() else self

    def take(self, rows: np.ndarray) -> "CodeSet":
        """Return the rows at these indices, in this order."""
        return CodeSet(
            {level: codes[rows] for level, codes in self.codes.items()},
            self.labels[rows],
            self.copies[rows],
            [self.keys[row] for row in rows],
        )


@dataclass(frozen=True)
class Codes:
    """Handle of a folder of codes."""

    artifact: Artifact
    levels: Mapping[str, Grid]  # coarse to fine
    classes: tuple[str, ...]
    vqvae: str  # digest of the VQ-VAE that encoded the images

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple(dict.fromkeys(name.rsplit("-", 1)[0] for name in self.files()))

    def files(self, split: str = "") -> list[str]:
        """List the Parquet files whose names begin with `split`."""
        return [name for name in self.artifact.files if name.endswith(".parquet") and name.startswith(split)]

    def split(self, split: str, levels: Iterable[str] | None = None) -> CodeSet:
        """Read the codes of a split, by default of all levels.

        Raises UserError if the split has no codes, a page's checksum is wrong, or a code is out of range.
        """
        grids = {level: self.levels[level] for level in (self.levels if levels is None else levels)}
        self.require_split(split)
        files = [_CodesFile(self.artifact.path(name)) for name in self.files(f"{split}-")]
        # Allocate once and fill: concatenation would double the memory, and a million images at 5,120 codes take 10 GB.
        count = sum(file.rows for file in files)
        codes = {level: np.empty((count, grid.height, grid.width), np.uint16) for level, grid in grids.items()}
        labels, copies = np.empty(count, np.int64), np.empty(count, np.uint16)
        keys: list[str] = []
        start = 0
        for file in files:
            file_codes = file.read(grids)
            rows = slice(start, start + len(file_codes))
            for level in grids:
                codes[level][rows] = file_codes.codes[level]
            labels[rows], copies[rows] = file_codes.labels, file_codes.copies
            keys += file_codes.keys
            start += len(file_codes)
        return CodeSet(codes, labels, copies, keys)

    def require_split(self, split: str) -> None:
        """Raise UserError if there are no codes of a split."""
        if split not in self.splits:
            raise UserError(
                f"There are no codes of split {split!r}.",
                where=self.artifact.folder,
                fix="Run: vqvae2 run --force --stage codes",
                code=4,
            )

    def by_file(self, split: str, levels: Iterable[str] | None = None) -> Iterator[CodeSet]:
        """Read the codes of a split file by file, in the order of the images. Raises UserError as `split` does."""
        grids = {level: self.levels[level] for level in (self.levels if levels is None else levels)}
        return (_CodesFile(self.artifact.path(name)).read(grids) for name in self.files(f"{split}-"))

    def rows(self, split: str) -> int:
        """Count the rows of a split, by the footers of its files."""
        return sum(_CodesFile(self.artifact.path(name)).rows for name in self.files(f"{split}-"))


def concatenate(sets: Sequence[CodeSet]) -> CodeSet:
    """Concatenate code sets of the same levels."""
    return CodeSet(
        {level: np.concatenate([codes.codes[level] for codes in sets]) for level in sets[0].codes},
        np.concatenate([codes.labels for codes in sets]),
        np.concatenate([codes.copies for codes in sets]),
        [key for codes in sets for key in codes.keys],
    )


def open_codes(folder: Path) -> Codes:
    """Open a folder of codes. Raises UserError if it is missing or incomplete."""
    codes_artifact = artifact.read(folder, KIND, "codes")
    meta = codes_artifact.meta
    levels = {name: Grid(**grid) for name, grid in meta["levels"].items()}
    return Codes(codes_artifact, levels, tuple(meta["classes"]), meta["vqvae"])


def write_codes_file(
    path: Path,
    levels: Mapping[str, Grid],
    codes: Mapping[str, np.ndarray],
    labels: np.ndarray,
    copies: np.ndarray,
    keys: Sequence[str],
    meta: Mapping[str, Any],
) -> None:
    """Write one file of codes atomically: N keys, copies, labels, and (N, H, W) codes per level.

    `meta` is JSON that is stored in the Parquet schema.
    """
    columns: dict[str, pa.Array] = {
        name: pa.array(values, column_type)
        for (name, column_type), values in zip(_COLUMNS.items(), (keys, copies, labels), strict=True)
    }
    for level, grid in levels.items():
        grids = np.ascontiguousarray(codes[level], dtype=np.uint16).reshape(-1, grid.height, grid.width)
        columns[level] = pa.FixedShapeTensorArray.from_numpy_ndarray(grids)
    table = pa.table(columns).replace_schema_metadata({"vqvae2": json.dumps(dict(meta))})
    with artifact.atomic_write(path) as temporary:
        pq.write_table(
            table,
            temporary,
            compression="zstd",
            row_group_size=ROWS_PER_GROUP,
            write_page_checksum=True,
            store_schema=True,
        )


class _CodesFile:
    """Parquet file of codes, which may come from someone else: every column is validated."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.rows = pq.read_metadata(path).num_rows
        except (OSError, pa.ArrowException) as error:
            raise self._error(f"The codes cannot be read: {error}") from error

    def read(self, levels: Mapping[str, Grid]) -> CodeSet:
        """Read some levels. Raises UserError if the file is damaged or a column is not valid."""
        try:
            with pq.ParquetFile(self.path, page_checksum_verification=True) as file:
                table = file.read([*_COLUMNS, *levels])
        except (OSError, pa.ArrowException) as error:
            raise self._error(f"The codes cannot be read: {error}") from error
        for name, column_type in _COLUMNS.items():
            self._check_column(table, name, column_type)
        codes = {level: self._read_level(table, level, grid) for level, grid in levels.items()}
        labels, copies = table["label"].to_numpy().astype(np.int64), table["copy"].to_numpy()
        return CodeSet(codes, labels, copies, table["key"].to_pylist())

    def _check_column(self, table: pa.Table, name: str, expected: pa.DataType) -> None:
        count = table.schema.names.count(name)
        if count != 1:
            raise self._error(f"The file must have one column {name}, got {count}.")
        actual = table.schema.field(name).type
        if actual != expected:
            raise self._error(f"Column {name} must be {expected}, got {actual}.")
        if table[name].null_count:
            raise self._error(f"Column {name} must have no missing values, got {table[name].null_count}.")

    def _read_level(self, table: pa.Table, level: str, grid: Grid) -> np.ndarray:
        """Return the codes of a level, (N, H, W) uint16."""
        self._check_column(table, level, pa.fixed_shape_tensor(pa.uint16(), (grid.height, grid.width)))
        # Empty chunks cannot be converted to arrays.
        chunks = [chunk.to_numpy_ndarray() for chunk in table[level].chunks if len(chunk)]
        grids = np.concatenate(chunks) if chunks else np.empty((0, grid.height, grid.width), np.uint16)
        if grids.size and grids.max() >= grid.entries:
            raise self._error(f"Codes of {level} must be below {grid.entries}, its entries, got {grids.max()}.")
        return grids

    def _error(self, what: str) -> UserError:
        return UserError(what, where=self.path, fix="Run: vqvae2 run --stage codes --force", code=4)
