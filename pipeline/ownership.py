"""Exclusive locks on folders: one process runs a stage, and one command runs the pipeline."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from stages.errors import UserError

WAIT = "Wait for it or stop it, then run the same command again."


@contextmanager
def exclusive_lock(folder: Path, doing: str = "Another process runs this stage") -> Iterator[None]:
    """Hold a folder for this process alone; refuse within a second while another holds it, for `doing`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+", encoding="utf-8") as file:
        try:
            _lock(file)  # the kernel lets go of it however the process ends
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{doing}: {file.read().strip() or 'it has just started'}.",
                where=folder / "lock",
                fix=WAIT,
                code=3,
            ) from None
        file.truncate(0)
        file.write(f"PID {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
        yield


def _lock(file: TextIO) -> None:
    for _ in range(5):  # who only asks for the owner holds it for an instant
        with suppress(BlockingIOError):
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(0.1)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def owner(folder: Path) -> str:
    """Name the process that holds a folder now; "" if none does."""
    try:
        with (folder / "lock").open(encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip() or "it has just started"
    except FileNotFoundError:
        pass
    return ""
