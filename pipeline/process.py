"""The process around a command: which code runs, under which environment variables, and when it must end."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stages.errors import UserError

DEFAULTS = {
    # Nobody hears of a run whom the user did not name.
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DVC_NO_ANALYTICS": "1",
    # Threads that wait by spinning slow every other process of a busy machine by a factor.
    "OMP_WAIT_POLICY": "passive",
    # glibc keeps freed memory instead of faulting it in again at every step.
    "MALLOC_TRIM_THRESHOLD_": "2000000000",
    "MALLOC_MMAP_THRESHOLD_": "2000000000",
    "MALLOC_TOP_PAD_": "268435456",
    # Ray Train: notice the end of a job sooner, and a worker that does not answer after a minute instead of ten; print
    # once, and do not ask a cloud about preemption.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
}


def prepare() -> None:
    """Set what child processes should find, unless the user has set it; run the code of the current folder."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    _use_code_here()


def require_project() -> None:
    """Refuse a folder that is no project, before a command finds that something is missing from it."""
    if not Path("dvc.yaml").is_file():
        raise UserError("There is no dvc.yaml here.", where=Path.cwd(), fix="Change to the project's folder.", code=2)


def _use_code_here() -> None:
    # A queued experiment runs in a copy of the project, while an editable install points at the original: without
    # this the copy's settings would run the original's code, and be recorded as the copy's.
    here, ours = Path.cwd(), Path(__file__).parents[1]
    if (here / "pipeline" / "cli.py").is_file() and not ours.samefile(here) and "VQVAE2_CODE" not in os.environ:
        path = os.pathsep.join(filter(None, (str(here), os.environ.get("PYTHONPATH"))))
        os.execve(
            sys.executable,
            [sys.executable, *sys.orig_argv[1:]],
            {**os.environ, "PYTHONPATH": path, "VQVAE2_CODE": str(here)},
        )


# What asks a process to end: a service manager, a terminal's Ctrl-C, a terminal that goes away.
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def not_ignored(*numbers: signal.Signals) -> Iterator[signal.Signals]:
    """Name the signals that are not to be ignored by the will of whoever started us, as SIGHUP is under `nohup`."""
    return (number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN)


@contextmanager
def handle_signals(answer: Callable[[int, Any], None]) -> Iterator[None]:
    """Answer what asks this process to end, for the length of the block; leave to the caller what was the caller's."""
    before = {number: signal.signal(number, answer) for number in not_ignored(*ENDING)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is answer:  # and has not had it ignored meanwhile
                signal.signal(number, handler)


def die_with_parent(number: signal.Signals) -> None:
    """Ask the kernel for a signal when the parent process dies. Linux only; elsewhere nothing happens."""
    # DVC killed by SIGKILL or SIGTERM leaves its command running, and would start a second one beside it.
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os.kill(os.getpid(), number)
