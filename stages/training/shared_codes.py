"""Codes shared by the ranks of a node: one rank decodes the Parquet files to arrays, and every rank maps these.

    CACHE/codes/DIGEST/       arrays of the codes of this digest; see formats/code_arrays.py
    CACHE/codes/DIGEST.lock   shared lock of those who read the arrays, exclusive lock of one who writes or deletes them

CACHE is the node's cache folder, or the rank's work folder if the cache cannot be written or has no room.
"""

import fcntl
import random
import shutil
import time
from pathlib import Path

from stages.errors import UserError
from stages.formats.artifact import Artifact
from stages.formats.code_arrays import CodeArrays, array_bytes, open_arrays, split_arrays, write_arrays
from stages.formats.codes import Codes
from stages.runtime.context import StageContext
from stages.runtime.node_cache import node_cache_dir
from stages.runtime.verification import mark_verified, verify_once

ATTEMPTS, RETRY_S = 50, (0.02, 0.2)  # to lock the arrays, and the time between two attempts
ANNOUNCED_BYTES = 1 << 29  # arrays of this size take about five seconds to write, so a message says so


class SharedCodes:
    """Arrays of codes on this node. While this object lives, no process deletes them."""

    def __init__(self, codes: Codes, context: StageContext):
        """Open the arrays of `codes`; make them unless another rank or run has done so on this node.

        Raises UserError if the codes are damaged, and OSError if no disk has room for the arrays.
        """
        roots = [context.work_dir / "codes"]
        try:
            roots.insert(0, node_cache_dir("codes"))
        except UserError:
            roots[0].mkdir(exist_ok=True)
        self._arrays = next(filter(None, (self._open(codes, root, root == roots[-1], context) for root in roots)))

    def split(self, split: str, levels: list[str]) -> CodeArrays:
        """Map some levels of a split."""
        return split_arrays(self._arrays, split, levels)

    def _open(self, codes: Codes, root: Path, is_last: bool, context: StageContext) -> Artifact | None:
        """Open or make the arrays in `root`.

        Return None if the disk has no locks or too little room, or if the arrays are damaged and in use, unless this is
        the last folder.
        """
        folder = root / codes.artifact.digest
        root.mkdir(exist_ok=True)
        # Network disks require a lock's own mode of access. The kernel unlocks the file when the process ends.
        self._lock = folder.with_suffix(".lock").open("a+")
        for _ in range(ATTEMPTS):
            try:
                fcntl.flock(self._lock, fcntl.LOCK_SH)
            except OSError:
                if is_last:
                    raise
                return None
            if arrays := _read(folder, codes):
                return arrays
            # Never wait for the exclusive lock: a rank that has arrays keeps its shared lock until its training ends.
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(random.uniform(*RETRY_S))  # ranks that look at the same time do not meet again
                continue
            if _read(folder, codes):  # the lock was released for an instant, and another rank has made them
                continue
            _delete_unused(root)
            size = array_bytes(codes)
            if not is_last and shutil.disk_usage(root).free < size:
                return None
            if size >= ANNOUNCED_BYTES:
                context.reporter.message(f"Decoding codes to {size / 1e9:.1f} GB of arrays in {root}.")
            write_arrays(codes, folder)
            mark_verified(open_arrays(folder, codes))
        if is_last:
            raise UserError(
                "The arrays of codes are damaged, and another training uses them.",
                where=folder,
                fix="Stop that training, then run the same command again.",
                code=4,
            )
        return None


def _read(folder: Path, codes: Codes) -> Artifact | None:
    """Return the arrays in `folder`; None if they are absent, incomplete or damaged, and must be written."""
    try:
        arrays = open_arrays(folder, codes)
        verify_once(arrays)
    except UserError:
        return None
    return arrays


def _delete_unused(root: Path) -> None:
    """Delete the arrays of other codes that no process has locked."""
    for path in root.glob("*.lock"):
        with path.open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # in use, or to be made by this process
                continue
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)
