"""Faults on demand, for whoever doubts that nothing is lost: off unless the environment variable is set.

    VQVAE2_FAULT=kill@vqvae:0:13,full@prior_top:0:20 vqvae2 run

is one fault or several, each `kind@stage:rank:step`: just before that stage's worker of that rank begins that step.
Steps count from 0, so 13 have been made when the one above comes; where a stage maps parts, they are its steps, and
the rank is 0. A fault comes once per work folder, where it leaves a marker, so that the same command then resumes.
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

VARIABLE = "VQVAE2_FAULT"
SLOW_FAULT_S = 5.0


class Fault(NamedTuple):
    """What happens, and where."""

    kind: str
    stage: str  # as on the command line: prior_top
    rank: int
    step: int

    @property
    def marker(self) -> str:
        """The file in the work folder that says it has come."""
        return f"fault-{self.kind}-{self.rank}-{self.step}"


def at(stage: str, rank: int, step: int, work: Path) -> bool:
    """Let come what is due before a step; say whether the step's numbers are to be spoilt, which the caller does."""
    inject_nan = False
    for fault in asked_for():
        if (fault.stage, fault.rank, fault.step) == (stage.replace("@", "_"), rank, step) and _first(work, fault):
            inject_nan |= fault.kind == NAN
            KINDS[fault.kind]()
    return inject_nan


def asked_for(stages: Collection[str] = ()) -> list[Fault]:
    """Read the variable; raise UserError if it cannot be read, or names none of the stages, where these are given."""
    text = os.environ.get(VARIABLE)
    found = [_parsed(entry.strip()) for entry in text.split(",")] if text else []
    for fault in found:
        if stages and fault.stage not in stages:
            raise UserError(
                f"{VARIABLE} names the stage {fault.stage!r}, which is none of {', '.join(stages)}.",
                where=f"{VARIABLE}={text}",
                fix=f"Write it as in {VARIABLE}=kill@vqvae:0:13, or unset it.",
                code=2,
            )
    return found


def _parsed(entry: str) -> Fault:
    found = re.fullmatch(r"(\w+)@(\w+(?:@\w+)?):(\d+):(\d+)", entry)
    if not found or found[1] not in KINDS:
        raise UserError(
            f"{VARIABLE} holds {entry!r}, which is not kind@stage:rank:step with a kind of {', '.join(KINDS)}.",
            where=VARIABLE,
            fix=f"Write it as in {VARIABLE}=kill@vqvae:0:13, or unset it.",
            code=2,
        )
    return Fault(found[1], found[2].replace("@", "_"), int(found[3]), int(found[4]))


def _first(work: Path, fault: Fault) -> bool:
    try:
        (work / fault.marker).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _signal(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def _raise() -> None:
    raise RuntimeError(f"a fault that {VARIABLE} asked for")


def _exit() -> None:
    os._exit(1)


def _full() -> None:
    """Fail the next time that this process wants to be sure of a file, as a full disk does."""
    real = os.fsync

    def once(file: int) -> None:
        os.fsync = real
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.fsync = once  # type: ignore[assignment]


def _slow() -> None:
    time.sleep(SLOW_FAULT_S)


NAN = "nan"
KINDS: dict[str, Callable[[], None]] = {
    "kill": _signal(signal.SIGKILL),
    "term": _signal(signal.SIGTERM),
    "stop": _signal(signal.SIGSTOP),
    "raise": _raise,
    "exit": _exit,
    "full": _full,
    NAN: lambda: None,
    "slow": _slow,
}
