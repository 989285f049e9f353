"""Fault injection for tests of fault tolerance, controlled by the environment variable VQVAE2_FAULT.

    VQVAE2_FAULT=kill@vqvae:0:13,full@prior_top:0:20 vqvae2 run

The value lists faults as `kind@stage:rank:step`. A fault happens just before the worker of that stage and rank begins
that step. Steps count from 0, so the first fault above happens after 13 steps. In a stage that maps parts, the step is
the number of the part and the rank is 0. A fault leaves a marker file in the work folder and happens once per work
folder, so the same command then resumes.
"""

import errno
import os
import re
import signal
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

from stages.errors import UserError

FAULT_VARIABLE = "VQVAE2_FAULT"
SLOW_FAULT_S = 5.0  # longer than it takes to write a checkpoint, and to send a signal by hand


class Fault(NamedTuple):
    """Kind of fault, and the worker and step it happens at."""

    kind: str
    stage: str  # as on the command line: prior_top
    rank: int
    step: int

    @property
    def marker(self) -> str:
        """Name of the marker file in the work folder."""
        return f"fault-{self.kind}-{self.rank}-{self.step}"


def inject_faults(stage: str, rank: int, step: int, work_dir: Path) -> bool:
    """Trigger the faults due before a step. Return True if the caller must replace the step's loss by NaN.

    Raises UserError if the variable is malformed.
    """
    inject_nan = False
    for fault in requested_faults():
        is_due = (fault.stage, fault.rank, fault.step) == (stage.replace("@", "_"), rank, step)
        if is_due and _mark_triggered(work_dir, fault):
            inject_nan |= fault.kind == NAN
            ACTIONS[fault.kind]()
    return inject_nan


def requested_faults(stages: Collection[str] = ()) -> list[Fault]:
    """Parse the environment variable.

    Raises UserError if it is malformed, or names none of `stages` where those are given.
    """
    text = os.environ.get(FAULT_VARIABLE)
    faults = [_parse_fault(item.strip()) for item in text.split(",")] if text else []
    for fault in faults:
        if stages and fault.stage not in stages:
            raise UserError(
                f"{FAULT_VARIABLE} must name one of the stages {', '.join(stages)}, got {fault.stage!r}.",
                where=f"{FAULT_VARIABLE}={text}",
                fix=f"Write it as in {FAULT_VARIABLE}=kill@vqvae:0:13, or unset it.",
                code=2,
            )
    return faults


def _parse_fault(text: str) -> Fault:
    match = re.fullmatch(r"(\w+)@(\w+(?:@\w+)?):(\d+):(\d+)", text)
    if not match or match[1] not in ACTIONS:
        raise UserError(
            f"{FAULT_VARIABLE} must hold kind@stage:rank:step with a kind of {', '.join(ACTIONS)}, got {text!r}.",
            where=FAULT_VARIABLE,
            fix=f"Write it as in {FAULT_VARIABLE}=kill@vqvae:0:13, or unset it.",
            code=2,
        )
    return Fault(match[1], match[2].replace("@", "_"), int(match[3]), int(match[4]))


def _mark_triggered(work_dir: Path, fault: Fault) -> bool:
    """Create the marker file. Return False if it exists, because the fault has already happened."""
    try:
        (work_dir / fault.marker).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _signal_self(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def _raise() -> None:
    raise RuntimeError(f"fault requested by {FAULT_VARIABLE}")


def _exit() -> None:
    os._exit(1)


def _fill_disk() -> None:
    """Make the next fsync of this process fail as on a full disk."""
    real_fsync = os.fsync

    def fail_once(file: int) -> None:
        os.fsync = real_fsync
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.fsync = fail_once  # type: ignore[assignment]


def _sleep() -> None:
    time.sleep(SLOW_FAULT_S)


NAN = "nan"
ACTIONS: dict[str, Callable[[], None]] = {
    "kill": _signal_self(signal.SIGKILL),
    "term": _signal_self(signal.SIGTERM),
    "stop": _signal_self(signal.SIGSTOP),
    "raise": _raise,
    "exit": _exit,
    "full": _fill_disk,
    NAN: lambda: None,
    "slow": _sleep,
}
