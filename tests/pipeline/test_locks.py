"""Exclusive locks on folders."""

import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipeline import locks
from stages.errors import UserError

ROOT = Path(__file__).parents[2]


def test_second_process_is_refused_and_reads_who_the_first_is(tmp_path: Path):
    """When the first one has ended, the lock is free."""
    with locks.exclusive_lock(tmp_path / "vqvae"):
        code = "import sys; from pathlib import Path; from pipeline.locks import exclusive_lock\n"
        code += f"with exclusive_lock(Path({str(tmp_path)!r}, 'vqvae')): sys.exit(9)"
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        assert f"Another process runs this stage: PID {os.getpid()} on " in second.stderr
    with locks.exclusive_lock(tmp_path / "vqvae"):
        pass


def test_owner_that_has_not_written_its_name_yet_is_respected(tmp_path: Path):
    """Between taking the lock and writing into it."""
    with (tmp_path / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert locks.owner(tmp_path) == locks.UNKNOWN_OWNER
        with pytest.raises(UserError, match="it has just started") as error, locks.exclusive_lock(tmp_path):
            pass
        assert (error.value.where, error.value.fix) == (str(tmp_path / "lock"), locks.RETRY_LATER)


def test_reading_the_owner_refuses_nobody(tmp_path: Path):
    """A command that wants the lock waits while another one reads its owner."""
    with locks.exclusive_lock(tmp_path):
        pass
    with (tmp_path / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        threading.Timer(0.2, lambda: fcntl.flock(file, fcntl.LOCK_UN)).start()
        with locks.exclusive_lock(tmp_path):
            assert f"PID {os.getpid()}" in locks.owner(tmp_path)
