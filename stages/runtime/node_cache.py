"""Cache folder of a node: what its processes share, and what may be deleted between runs."""

import fcntl
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from stages.errors import UserError


class LocalDiskError(UserError):
    """Local disk that cannot hold a download."""


def node_cache_dir(*names: str) -> Path:
    """Create and return a cache folder on this node, which may be deleted between runs.

    Raises LocalDiskError if that is impossible, also for a user without a home folder.
    """
    try:
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:  # HOME is not set, and the user has no entry in the list of users
        raise LocalDiskError(
            "This node has no cache folder: the user has no home folder.",
            where=f"user {os.getuid()} on {platform.node()}",
            fix="Set HOME, or XDG_CACHE_HOME, to a folder that this user can write to.",
            code=3,
        ) from error
    folder = Path(caches, "vqvae2", *names)
    with local_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def claim_folder(folder: Path) -> Iterator[None]:
    """Create a folder, and keep other processes from removing it during the block.

    Removes its siblings that no process claims: those of killed processes. A lock beside a folder is its claim, which
    ends with the process.
    """
    with ExitStack() as claims:
        with local_disk_errors(folder):
            claims.enter_context(_try_lock(folder))
            for sibling in folder.parent.iterdir():
                if sibling.is_dir() and sibling != folder:
                    with _try_lock(sibling) as is_abandoned:
                        if is_abandoned:
                            shutil.rmtree(sibling, ignore_errors=True)
            folder.mkdir(exist_ok=True)
        yield


@contextmanager
def _try_lock(folder: Path) -> Iterator[bool]:
    """Lock a folder for the block if no other process has; yield whether it is locked."""
    path = folder.with_name(f"{folder.name}.lock")
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
        path.unlink(missing_ok=True)


@contextmanager
def local_disk_errors(folder: Path) -> Iterator[None]:
    """Turn OSError into LocalDiskError, which names node and folder. Errors of the store already are UserErrors."""
    try:
        yield
    except OSError as error:
        raise LocalDiskError(
            f"This node cannot write what it downloads from the storage: {error.strerror or error}.",
            where=f"{folder} on {platform.node()}",
            fix="Free some space or fix the permissions there, then run the same command again.",
            code=3,
        ) from error
