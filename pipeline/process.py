"""Process setup of a command: environment variables, which code runs, and signals."""

import ctypes
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stages.errors import UserError, install_command
from stages.runtime.heartbeat_timeout import HEARTBEAT_TIMEOUT_S, HEARTBEAT_TIMEOUT_VARIABLE

DEFAULTS = {
    # No usage reports to the projects of Ray, MLflow and DVC.
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DVC_NO_ANALYTICS": "1",
    # OpenMP threads that spin while they wait slow down all other processes of a busy machine.
    "OMP_WAIT_POLICY": "passive",
    # glibc keeps freed memory instead of faulting it in again at every step.
    "MALLOC_TRIM_THRESHOLD_": "2000000000",
    "MALLOC_MMAP_THRESHOLD_": "2000000000",
    "MALLOC_TOP_PAD_": "268435456",
    # Ray Train: poll workers every 0.2 s instead of 2 s, give up on one after 1 min instead of 10 min, and print each
    # line once.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    HEARTBEAT_TIMEOUT_VARIABLE: str(HEARTBEAT_TIMEOUT_S),
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # Ray measures the processes of a private cluster once a minute instead of every 5 s, for a dashboard that does not
    # run.
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
}
PROJECT_NAME = "vqvae2"  # in pyproject.toml
# Signals that ask a process to end: from a service manager, Ctrl-C, and a closed terminal.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


def prepare() -> None:
    """Set the default environment variables for child processes, and run the code of the current folder."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    _use_code_of_current_folder()


def require_project() -> None:
    """Raise UserError if the current folder is not a project."""
    if not Path("dvc.yaml").is_file():
        raise UserError(
            "dvc.yaml does not exist.",
            where=Path.cwd(),
            fix="Change to the folder of the project, or create one: vqvae2 init my-project",
            code=2,
        )


def is_copy_of_project(folder: Path) -> bool:
    """Return whether a folder holds the code of this project. Reads files and executes none of them."""
    if not (folder / "pipeline" / "cli.py").is_file():
        return False
    import tomllib

    try:
        with (folder / "pyproject.toml").open("rb") as file:
            return bool(tomllib.load(file)["project"]["name"] == PROJECT_NAME)
    except (OSError, ValueError, LookupError, TypeError):  # none, not TOML, or of another form
        return False


def is_temporary_copy() -> bool:
    """Return whether `dvc exp run --temp` or the queue runs this process in a copy, which DVC deletes afterwards."""
    root = os.environ.get("DVC_ROOT")
    return bool(root) and Path(str(root), ".dvc").resolve() in Path.cwd().parents


def stopped(number: int) -> int:
    """Print which signal ended the work; return the exit status."""
    advice = (
        "DVC deletes this copy of the project, so the stage resumes only if cluster.storage is set."
        if is_temporary_copy()
        else "Run the same command again to resume."
    )
    print(f"Stopped by {signal.Signals(number).name}. {advice}", file=sys.stderr)
    return 128 + number


def _use_code_of_current_folder() -> None:
    # `dvc exp run --queue` runs in a copy of the project, while an editable install points to the original. Without
    # this, the original's code would run under the copy's settings and be recorded as the copy's.
    folder, installed = Path.cwd(), Path(__file__).parents[1]
    if is_copy_of_project(folder) and not installed.samefile(folder):
        if os.environ.get("VQVAE2_CODE") == str(folder):  # restarted once, and Python still imports other code
            reason = f"its path contains {os.pathsep!r}" if os.pathsep in str(folder) else "PYTHONPATH has no effect"
            print(
                f"error: The code of this copy of the project cannot be run: {reason}.\n  in: {folder}\n"
                f"  fix: Rename the folder, or install it: {install_command()}",
                file=sys.stderr,
            )
            raise SystemExit(2)
        path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
        os.execve(
            sys.executable,
            [sys.executable, *sys.orig_argv[1:]],
            {**os.environ, "PYTHONPATH": path, "VQVAE2_CODE": str(folder)},
        )


def not_ignored(*numbers: signal.Signals) -> Iterator[signal.Signals]:
    """Yield the signals that this process does not ignore; `nohup` for example starts it with SIGHUP ignored."""
    return (number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN)


@contextmanager
def handle_signals(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Handle the signals that ask this process to end, and restore the earlier handlers afterwards."""
    before = {number: signal.signal(number, handler) for number in not_ignored(*STOP_SIGNALS)}
    try:
        yield
    finally:
        for number, earlier in before.items():
            if signal.getsignal(number) is handler:  # not replaced inside of the block
                signal.signal(number, earlier)


def die_with_parent(number: signal.Signals) -> None:
    """Ask the kernel for a signal when the parent process dies. Linux only; a no-op elsewhere."""
    # Otherwise DVC ended by SIGKILL or SIGTERM leaves its stage running, and the next run starts a second one.
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:  # it died before the call
            os.kill(os.getpid(), number)


def discard_output_if_closed() -> bool:
    """Return whether the reader of standard output has closed it, as `| head` does; if so, discard further output."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return closed
