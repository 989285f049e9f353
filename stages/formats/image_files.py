"""NumPy archive of images, as other programs read it.

arr_0 has the images (N, H, W, 3) uint8, and arr_1 their labels (N,) int64 where there are classes: the layout that the
evaluation of guided diffusion reads (github.com/openai/guided-diffusion, evaluations/README.md).
"""

import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from stages.formats.artifact import atomic_write


def write_npz(path: Path, images: Iterable[np.ndarray], shape: tuple[int, ...], labels: np.ndarray | None) -> None:
    """Write images one by one, so that memory holds one of them. `shape` is (N, H, W, 3).

    Equal images give equal bytes. Raises OSError that names `path` if the disk is full.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with atomic_write(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        # ZipInfo without a time has a fixed one; the default of an entry is now.
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as entry:
            np.lib.format.write_array_header_1_0(entry, header)
            for image in images:
                entry.write(np.ascontiguousarray(image).tobytes())
        if labels is not None:
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as entry:
                np.lib.format.write_array(entry, labels, allow_pickle=False)
