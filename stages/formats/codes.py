"""Codes in Parquet: one row per image and copy, a grid of codes per level.

    {split}-{number:05d}.parquet    as the shards they come from
        key      string             the image's key in its shard
        copy     uint16             0: the image as it is; 1, 2, ...: augmented copies of it
        label    int32              index into the classes; -1 where there are none
        <level>  fixed-shape tensor of uint16, H x W, for each level coarse to fine
    manifest.json   meta: levels (entries, grid), classes, and the digest of the VQ-VAE that made them

Codes are dictionary-encoded, so that Parquet stores one of 512 entries in 9 bits, and every page carries a checksum
that is verified when it is read. Plain pyarrow and Ray Data read the files; see docs/formats.md.
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
_BESIDE = {"key": pa.string(), "copy": pa.uint16(), "label": pa.int32()}  # the levels
ROWS_PER_GROUP = 16_384  # large enough that each group's own dictionary of entries weighs little


@dataclass(frozen=True)
class CodeSet:
    """The codes of one split, in memory."""

    codes: Mapping[str, np.ndarray]  # level -> (N, H, W) uint16
    labels: np.ndarray  # (N,) int64, -1 without classes
    copies: np.ndarray  # (N,) uint16
    keys: Sequence[str]

    def __len__(self) -> int:
        return len(self.labels)

    def plain(self) -> "CodeSet":
        """Leave out augmented copies."""
        return self.take(np.flatnonzero(self.copies == 0)) if self.copies.any() else self

    def take(self, rows: np.ndarray) -> "CodeSet":
        """Keep the rows at these places, in this order."""
        return CodeSet(
            {level: codes[rows] for level, codes in self.codes.items()},
            self.labels[rows],
            self.copies[rows],
            [self.keys[row] for row in rows],
        )


@dataclass(frozen=True)
class Codes:
    """A folder of codes."""

    found: Artifact
    levels: Mapping[str, Grid]  # coarse to fine
    classes: tuple[str, ...]
    vqvae: str  # digest of the VQ-VAE that made them

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name.rsplit("-", 1)[0] for name in self.files()))

    def files(self, split: str = "") -> list[str]:
        """Name the Parquet files, of one split or of all."""
        return [name for name in self.found.files if name.endswith(".parquet") and name.startswith(split)]

    def split(self, split: str, levels: Iterable[str] | None = None) -> CodeSet:
        """Read the codes of a split, of some levels or of all, verifying every page's checksum and every code's range.

        Nothing is held twice: at 5,120 codes each, the codes of a million images take 10 GB.
        """
        wanted = {level: self.levels[level] for level in (self.levels if levels is None else levels)}
        files = [_Opened(self.found.path(name)) for name in self.files(f"{split}-")]
        if not files:
            raise UserError(
                f"There are no codes of split {split!r}.",
                where=self.found.folder,
                fix="Run: vqvae2 run --force --stage codes",
                code=4,
            )
        rows = sum(file.rows for file in files)
        codes = {level: np.empty((rows, shape.height, shape.width), np.uint16) for level, shape in wanted.items()}
        labels, copies = np.empty(rows, np.int64), np.empty(rows, np.uint16)
        keys: list[str] = []
        start = 0
        for file in files:
            part = file.read(wanted)
            here = slice(start, start + len(part))
            for level, grids in part.codes.items():
                codes[level][here] = grids
            labels[here], copies[here] = part.labels, part.copies
            keys += part.keys
            start += len(part)
        return CodeSet(codes, labels, copies, keys)

    def parts(self, split: str) -> Iterator[CodeSet]:
        """Read the codes of a split one file after the other, in the order of the images."""
        return (_Opened(self.found.path(name)).read(self.levels) for name in self.files(f"{split}-"))


def joined(parts: Sequence[CodeSet]) -> CodeSet:
    """Put sets of the same levels one behind the other."""
    return CodeSet(
        {level: np.concatenate([part.codes[level] for part in parts]) for level in parts[0].codes},
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.copies for part in parts]),
        [key for part in parts for key in part.keys],
    )


def open_codes(folder: Path) -> Codes:
    """Open a folder of codes."""
    found = artifact.read(folder, KIND, "codes")
    meta = found.meta
    levels = {name: Grid(**shape) for name, shape in meta["levels"].items()}
    return Codes(found, levels, tuple(meta["classes"]), meta["vqvae"])


def write_part(
    path: Path,
    levels: Mapping[str, Grid],
    codes: Mapping[str, np.ndarray],
    labels: np.ndarray,
    copies: np.ndarray,
    keys: Sequence[str],
    meta: Mapping[str, Any],
) -> None:
    """Write one file of codes, whole or not at all. `meta` is kept in the file's own schema."""
    columns: dict[str, pa.Array] = {
        name: pa.array(values, kind)
        for (name, kind), values in zip(_BESIDE.items(), (keys, copies, labels), strict=True)
    }
    for level, shape in levels.items():
        grids = np.ascontiguousarray(codes[level], dtype=np.uint16).reshape(-1, shape.height, shape.width)
        columns[level] = pa.FixedShapeTensorArray.from_numpy_ndarray(grids)
    table = pa.table(columns).replace_schema_metadata({"vqvae2": json.dumps(dict(meta))})
    with artifact.atomic_write(path) as new:
        pq.write_table(
            table, new, compression="zstd", row_group_size=ROWS_PER_GROUP, write_page_checksum=True, store_schema=True
        )


class _Opened:
    """One file of codes."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.rows = pq.read_metadata(path).num_rows
        except (OSError, pa.ArrowException) as error:
            raise self._wrong(f"The codes cannot be read: {error}") from error

    def read(self, levels: Mapping[str, Grid]) -> CodeSet:
        try:
            with pq.ParquetFile(self.path, page_checksum_verification=True) as file:
                table = file.read([*_BESIDE, *levels])
        except (OSError, pa.ArrowException) as error:
            raise self._wrong(f"The codes cannot be read: {error}") from error
        for name, kind in _BESIDE.items():
            self._check(table, name, kind)
        codes = {level: self._checked(table, level, shape) for level, shape in levels.items()}
        labels, copies = table["label"].to_numpy().astype(np.int64), table["copy"].to_numpy()
        return CodeSet(codes, labels, copies, table["key"].to_pylist())

    def _check(self, table: pa.Table, name: str, kind: pa.DataType) -> None:
        times = table.schema.names.count(name)
        found = table.schema.field(name).type if times == 1 else "too much" if times else "nothing"
        if found == kind and table[name].null_count:
            found = "gaps"
        if found != kind:
            raise self._wrong(f"Column {name} holds {found}, not {kind}.")

    def _checked(self, table: pa.Table, level: str, shape: Grid) -> np.ndarray:
        self._check(table, level, pa.fixed_shape_tensor(pa.uint16(), (shape.height, shape.width)))
        grids = _grids(table, level, shape)
        if grids.size and grids.max() >= shape.entries:
            raise self._wrong(f"Column {level} holds code {grids.max()}, but its codebook has {shape.entries} entries.")
        return grids

    def _wrong(self, what: str) -> UserError:
        return UserError(what, where=self.path, fix="Run: vqvae2 run --stage codes --force", code=4)


def _grids(table: pa.Table, level: str, shape: Grid) -> np.ndarray:
    chunks = [chunk.to_numpy_ndarray() for chunk in _chunks(table[level])]
    empty = np.empty((0, shape.height, shape.width), np.uint16)
    return np.concatenate(chunks) if chunks else empty


def _chunks(column: pa.ChunkedArray) -> Iterator[pa.FixedShapeTensorArray]:
    return (chunk for chunk in column.chunks if len(chunk))
