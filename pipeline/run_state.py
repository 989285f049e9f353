"""State of each stage in the run that goes on, in a file that `vqvae2 status` reads.

    runs/state.json    {"codes": "running", "prior_top": "waiting", ...}

DVC cannot be asked while it runs a stage. The file exists only while `vqvae2 run` holds the lock of the project.
"""

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.dvc_yaml import cli_name
from stages.formats import artifact

FILE = "state.json"
WAITING, RUNNING, UP_TO_DATE = "waiting", "running", "up to date"


class RunState:
    """Writer of the file. Stages are named as in DVC."""

    def __init__(self, runs: Path, stages: Collection[str], out_of_date: Collection[str]):
        self._path = runs / FILE
        self._states = {cli_name(name): WAITING if name in out_of_date else UP_TO_DATE for name in stages}
        self._write()

    def update(self, visited: Collection[str], current: str) -> None:
        """Record the stages that DVC has come to, and the one that it runs, "" for none."""
        for name in visited:
            self._states[cli_name(name)] = RUNNING if name == current else UP_TO_DATE
        self._write()

    def _write(self) -> None:
        with suppress(OSError), artifact.atomic_write(self._path) as path:  # a full disk; the run itself may succeed
            path.write_text(json.dumps(self._states), encoding="utf-8")


@contextmanager
def record_run_state(runs: Path, stages: Collection[str], out_of_date: Collection[str]) -> Iterator[RunState]:
    """Keep the file during the block."""
    try:
        yield RunState(runs, stages, out_of_date)
    finally:
        clear(runs)


def clear(runs: Path) -> None:
    """Delete the file of a run that was killed; call it while holding the lock of the project."""
    (runs / FILE).unlink(missing_ok=True)


def read(runs: Path) -> dict[str, str]:
    """Return the state of each stage by its name in commands; empty if no run is going on."""
    try:
        return dict(json.loads((runs / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
