"""Exclusive locks on folders: one process per stage, and one command per project."""

import fcntl
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from pipeline.text import shorten
from stages.errors import UserError
from stages.tracking.journal import redact_secrets

LOCK_FILE = "lock"
BUSY = "Another vqvae2 or dvc process uses this project"
RETRY_LATER = "Wait until it ends, or stop it. Then run the same command again."
UNKNOWN_OWNER = "it has just started"  # the lock is held and its owner has not written its name yet
MAX_COMMAND_LENGTH = 200  # characters of a command in a message
ATTEMPTS, ATTEMPT_INTERVAL_S = 5, 0.1


@contextmanager
def exclusive_lock(folder: Path, refusal: str = "Another process runs this stage") -> Iterator[None]:
    """Lock a folder for this process.

    Raises UserError with `refusal` and the owner as the headline if another process holds the lock for half a second.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("a+", encoding="utf-8") as file:
        try:
            _lock(file)  # the kernel releases it however the process ends
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{refusal}: {file.read().strip() or UNKNOWN_OWNER}.", where=folder / LOCK_FILE, fix=RETRY_LATER, code=3
            ) from None
        file.truncate(0)
        start = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"PID {os.getpid()} on {socket.gethostname()} since {start} ({_command_line()})")
        file.flush()
        yield


@contextmanager
def exclusive_project(runs: Path, *, temporary: bool = False) -> Iterator[None]:
    """Lock the project for this command, because stages read params.yaml when they start.

    `runs` is the folder with one folder per stage. If this creates it and `temporary` is set, it is deleted at the end.
    Raises UserError if another command or stage is running.
    """
    delete = temporary and not runs.exists()
    with exclusive_lock(runs, BUSY):
        for lock in sorted(runs.glob("*/lock")):
            if holder := owner(lock.parent):  # a stage started by `dvc repro` or `vqvae2 stage`
                raise UserError(f"{BUSY}: {holder}.", where=lock, fix=RETRY_LATER, code=3)
        try:
            yield
        finally:
            if delete:
                (runs / LOCK_FILE).unlink()
                with suppress(OSError):  # not empty
                    runs.rmdir()


def _command_line() -> str:
    """Return the command that this process runs, without secrets."""
    program = "typer" if Path(sys.argv[0]).name == "typer" else "vqvae2"
    return shorten(redact_secrets(shlex.join([program, *sys.argv[1:]])), MAX_COMMAND_LENGTH)


def _lock(file: TextIO) -> None:
    for _ in range(ATTEMPTS):  # `owner` holds the lock for an instant
        with suppress(BlockingIOError):
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(ATTEMPT_INTERVAL_S)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def owner(folder: Path) -> str:
    """Return the description of the process that holds a folder's lock; "" if it is free."""
    try:
        with (folder / LOCK_FILE).open(encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip() or UNKNOWN_OWNER
    except FileNotFoundError:
        pass
    return ""
