"""Files of an evaluation's parts and features, in its work folder.

The result of each part is saved to a file named after the part, so an interrupted run computes only the missing parts.
Features are files too: sets of 50,000 images do not fit into the memory of every process.

Axes: N images, D features.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from stages.formats import artifact
from stages.mapping.parts import Part, Result, pack, unpack

KIND = FEATURES = "features"  # kind of the artifact, and name of the array in each of its files


def part_path(folder: Path, part: Part) -> Path:
    """Return the file of a part's result: its values are joined, without the weight."""
    return folder / f"{'-'.join(str(value) for key, value in part.items() if key != 'weight')}.safetensors"


def load_or_compute(path: Path, compute: Callable[[], Mapping[str, Any]]) -> Result:
    """Read the result of a part from its file, or compute and save it."""
    if not artifact.has_valid_checksum(path):
        with artifact.atomic_write(path) as temporary:
            temporary.write_bytes(pack(dict(compute())))
        artifact.write_checksum(path)
    return unpack(path.read_bytes())


class FeatureFile:
    """The first N features (N, D) in a file, by default all; a slice reads the rows."""

    def __init__(self, path: Path, rows: int | None = None):
        self.path = path
        with safe_open(path, framework="numpy") as file:
            all_rows, features = file.get_slice(FEATURES).get_shape()
        self.shape = (all_rows if rows is None else min(rows, all_rows), features)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Read rows, (n, D). Raises ValueError for a slice with a step."""
        start, stop, step = rows.indices(len(self))
        if step != 1:
            raise ValueError(f"Rows must be consecutive, got a step of {step}.")
        if start >= stop:
            return np.empty((0, self.shape[1]), np.float32)
        # Opened for each read, so that earlier rows leave the memory.
        with safe_open(self.path, framework="numpy") as file:
            return file.get_slice(FEATURES)[start:stop]


def feature_name(network: str, image_set: str) -> str:
    """Return the name of the file with the features of an image set."""
    return f"{network}-{image_set}.safetensors"


def write_features(folder: Path, parts: Mapping[str, Sequence[Path]]) -> None:
    """Write files of features as one artifact: name -> files of the parts that computed the rows, in their order."""
    with artifact.commit_folder(folder, KIND, {}) as temporary:
        for name, paths in parts.items():
            _write_array(temporary / name, (unpack(path.read_bytes())["features"] for path in paths), paths)


def _write_array(path: Path, blocks: Iterable[np.ndarray], paths: Sequence[Path]) -> None:
    """Write float32 rows block by block, because all need not fit into the memory.

    The number of rows comes from the names of the parts' files. The layout is that of safetensors: the length of a
    JSON header as 8 bytes, the header, and the values. Raises ValueError if the blocks have another number of rows.
    """
    rows, written = int(paths[-1].stem.rpartition("-")[2]), 0
    with path.open("wb") as file:
        for block in blocks:
            if not file.tell():
                shape = [rows, block.shape[1]]
                entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * rows * block.shape[1]]}
                header = json.dumps({FEATURES: entry}).encode()
                header += b" " * (-len(header) % 8)  # aligns the values
                file.write(len(header).to_bytes(8, "little") + header)
            file.write(block.astype("<f4").tobytes())
            written += len(block)
    if written != rows:
        raise ValueError(f"{path.name} must have {rows} rows, got {written}")
