"""Codes as memory-mapped arrays, for training to read at random: a decoded copy of an artifact of codes (Parquet).

    {split}-{level}.npy     (N, H, W) uint16, the rows of all files of the split in order
    {split}-label.npy       (N,) int64; -1 without classes
    {split}-copy.npy        (N,) uint16; 0: the original image
    manifest.json           meta: digest of the codes; see formats/artifact.py

All processes of a node that map the same file share its pages in memory. The arrays are a cache, not the output of a
stage.

Axes: N rows, H x W grid of codes of a level.
"""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stages.errors import UserError
from stages.formats import artifact
from stages.formats.artifact import Artifact
from stages.formats.codes import Codes

KIND = "code_arrays"


@dataclass(frozen=True)
class CodeArrays:
    """Read-only arrays of one split. Accessing rows reads them from the disk."""

    codes: Mapping[str, np.ndarray]  # level -> (N, H, W) uint16
    labels: np.ndarray  # (N,) int64, -1 without classes
    copies: np.ndarray  # (N,) uint16

    def __len__(self) -> int:
        return len(self.labels)


def array_bytes(codes: Codes) -> int:
    """Return the size of the arrays of all splits."""
    # Codes are uint16; beside them a row has a label (int64) and a copy (uint16).
    bytes_per_row = 2 * sum(grid.height * grid.width for grid in codes.levels.values()) + 8 + 2
    return bytes_per_row * sum(map(codes.rows, codes.splits))


def write_arrays(codes: Codes, folder: Path) -> None:
    """Write the arrays of all splits and levels to `folder`.

    Holds one Parquet file in memory. Raises UserError as `Codes.by_file` does, and OSError if the disk is full.
    """
    with artifact.commit_folder(folder, KIND, {"codes": codes.artifact.digest}) as out:
        for split in codes.splits:
            rows = codes.rows(split)
            shapes = {level: (rows, grid.height, grid.width) for level, grid in codes.levels.items()}
            # Streams rather than writable memory maps: a full disk raises OSError here, and SIGBUS there.
            with ExitStack() as stack:
                files = {}
                for name, shape in {**shapes, "label": (rows,), "copy": (rows,)}.items():
                    files[name] = stack.enter_context((out / f"{split}-{name}.npy").open("wb"))
                    header = {"descr": "<i8" if name == "label" else "<u2", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(files[name], header)
                for file_codes in codes.by_file(split):
                    columns = {**file_codes.codes, "label": file_codes.labels, "copy": file_codes.copies}
                    for name, values in columns.items():
                        values.tofile(files[name])


def open_arrays(folder: Path, codes: Codes) -> Artifact:
    """Open the folder of arrays made from `codes`. Raises UserError if it is missing, incomplete or of other codes."""
    arrays = artifact.read(folder, KIND)
    if arrays.meta["codes"] != codes.artifact.digest:
        raise UserError(
            f"The arrays must be of codes {codes.artifact.digest[:12]}, got codes {arrays.meta['codes'][:12]}.",
            where=folder,
            fix=f"Delete {folder}",
            code=5,
        )
    return arrays


def split_arrays(arrays: Artifact, split: str, levels: Iterable[str]) -> CodeArrays:
    """Map the arrays of some levels of a split."""
    return CodeArrays(
        {level: _map(arrays.path(f"{split}-{level}.npy")) for level in levels},
        _map(arrays.path(f"{split}-label.npy")),
        _map(arrays.path(f"{split}-copy.npy")),
    )


def _map(path: Path) -> np.ndarray:
    # A plain view, because every selection from a numpy.memmap would be a numpy.memmap.
    return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
