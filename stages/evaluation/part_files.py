"""Files of an evaluation's parts and features, in its work folder.

The result of each part is saved to a file named after the part, so an interrupted run computes only the missing parts.
Features are files too: sets of 50,000 images do not fit into the memory of every process.

Axes: N images, D features.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stages.formats import artifact
from stages.mapping.parts import Part, Result, pack, unpack

KIND = "features"  # of the artifact


def part_path(folder: Path, part: Part) -> Path:
    """Return the file of a part's result: its values are joined, without the weight."""
    return folder / f"{'-'.join(str(value) for key, value in part.items() if key != 'weight')}.npz"


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
        self.path, self._rows = path, rows
        self.shape: tuple[int, ...] = self._map().shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        return np.array(self._map()[rows])  # mapped for each read, so that earlier rows leave the memory

    def _map(self) -> np.ndarray:
        return np.asarray(np.load(self.path, mmap_mode="r", allow_pickle=False))[: self._rows]


def feature_name(network: str, image_set: str) -> str:
    """Return the name of the file with the features of an image set."""
    return f"{network}-{image_set}.npy"


def write_features(folder: Path, parts: Mapping[str, Sequence[Path]]) -> None:
    """Write files of features as one artifact: name -> files of the parts that computed the rows, in their order."""
    with artifact.commit_folder(folder, KIND, {}) as temporary:
        for name, paths in parts.items():
            _write_array(temporary / name, (unpack(path.read_bytes())["features"] for path in paths), paths)


def _write_array(path: Path, blocks: Iterable[np.ndarray], paths: Sequence[Path]) -> None:
    """Write rows block by block. The number of rows comes from the names of the parts' files."""
    rows = int(paths[-1].stem.rpartition("-")[2])
    array = None
    start = 0
    for block in blocks:
        if array is None:
            array = np.lib.format.open_memmap(path, mode="w+", dtype=block.dtype, shape=(rows, *block.shape[1:]))
        array[start : start + len(block)] = block
        start += len(block)
    assert array is not None
    array.flush()
