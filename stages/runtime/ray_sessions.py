"""Folder of Ray's sessions on this machine, with the Unix sockets of its processes."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from stages.errors import UserError

FALLBACK = Path("/tmp")
MAX_SOCKET_PATH = 103 if sys.platform == "darwin" else 107  # bytes, set by the operating system
LONGEST_SOCKET = "ray/session_2000-01-01_00-00-00_000000_4194304/sockets/plasma_store"
MAX_LENGTH = MAX_SOCKET_PATH - len(LONGEST_SOCKET) - 1  # of the path of the folder


def sessions_parent(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the folder in which a private cluster creates the folder `ray` of its sessions.

    RAY_TMPDIR, else TMPDIR on Linux, else /tmp, as Ray chooses it. If the path of TMPDIR is too long for sockets, /tmp.
    Raises UserError if RAY_TMPDIR is too long, or if the folder cannot be written to.
    """
    chosen = environment.get("RAY_TMPDIR", "")
    length = len(os.fsencode(chosen))
    if length > MAX_LENGTH:
        raise UserError(
            f"RAY_TMPDIR must have at most {MAX_LENGTH} bytes, because it holds sockets, got {length}.",
            where=f"RAY_TMPDIR={chosen}",
            fix="Choose a folder with a shorter path, or unset it.",
            code=2,
        )
    default = environment.get("TMPDIR", "") if sys.platform.startswith("linux") else ""
    if len(os.fsencode(default)) > MAX_LENGTH:
        default = ""
    folder = Path(chosen or default or FALLBACK)
    existing = next(parent for parent in (folder / "ray", *(folder / "ray").parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            "Ray cannot write its sessions.",
            where=existing,
            fix="Fix its permissions, or set RAY_TMPDIR to another folder.",
            code=3,
        )
    return folder
