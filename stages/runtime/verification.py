"""Verification of artifacts once per node: files that have not changed since are not hashed again.

Every stage hashes its inputs when it starts, which takes minutes for 77 GB of shards. So this node notes the inode,
size and times of each file it has verified, as Git does in its index.
"""

import hashlib
import json
import time
from pathlib import Path

from stages.errors import UserError
from stages.formats import artifact
from stages.formats.artifact import Artifact
from stages.runtime.node_cache import node_cache_dir

# A file that is younger may change once more without another time of modification: clocks of file systems are coarse.
MIN_AGE_S = 1.0

FileStates = dict[str, list[int]]  # name -> inode, bytes, and the times of modification and of change in ns


def verify_once(target: Artifact) -> None:
    """Hash every file of an artifact, unless this node has done so and no file has changed since.

    Raises UserError if a file differs from the manifest.
    """
    states = _file_states(target)
    if states and _noted_states(target) == states:
        return
    start = time.time_ns()
    target.verify()
    newest = max((max(state[2:]) for state in states.values()), default=start)
    if start - newest > MIN_AGE_S * 1e9 and _file_states(target) == states:
        _write_note(target, states)


def mark_verified(target: Artifact) -> None:
    """Note that an artifact is intact, which this process has just written where no other program writes."""
    _write_note(target, _file_states(target))


def _write_note(target: Artifact, states: FileStates) -> None:
    try:
        with artifact.atomic_write(_note_path(target)) as temporary:
            temporary.write_text(json.dumps(states), encoding="utf-8")
    except (OSError, UserError):
        pass  # the node's cache cannot be written: the next start hashes the files again


def _noted_states(target: Artifact) -> FileStates | None:
    try:
        return dict(json.loads(_note_path(target).read_bytes()))
    except (OSError, UserError, ValueError, TypeError):
        return None


def _note_path(target: Artifact) -> Path:
    name = f"{target.digest} {target.folder.absolute()}".encode("utf-8", "surrogateescape")
    return node_cache_dir("verified") / f"{hashlib.sha256(name).hexdigest()[:32]}.json"


def _file_states(target: Artifact) -> FileStates:
    """Return the state of each file; empty if one cannot be read, which `Artifact.verify` reports."""
    states = {}
    try:
        for name in target.files:
            status = target.path(name).stat()
            states[name] = [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    except OSError:
        return {}
    return states
