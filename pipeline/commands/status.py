"""`vqvae2 status`: the state of each stage, why it is not up to date, and the progress of the one that runs."""

import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline import activity, dvc, dvc_yaml, locks, params, result_versions, run_state, stage_runner
from pipeline.activity import Activity
from pipeline.checks.inputs import require_project_outside
from pipeline.params_drift import warn_drift
from pipeline.text import first_few, format_row, wrap
from stages.errors import UserError

WATCH_INTERVAL_S = 2.0
OUT_OF_DATE, UNKNOWN = "out of date", "unknown"


@dataclass(frozen=True)
class Row:
    """State of one stage."""

    stage: str  # name in commands
    state: str
    reasons: list[str]
    activity: Activity | None

    def to_json(self) -> dict[str, Any]:
        """Return the row as JSON values."""
        idle = {"owner": None, "progress": None, "checkpoint": None}
        facts = self.activity.to_json() if self.activity else idle
        return {"stage": self.stage, "state": self.state, "reasons": self.reasons, **facts}

    def text(self) -> str:
        """Format the row as a line."""
        progress = ", ".join(self.activity.describe()) if self.activity else ""
        if self.state == OUT_OF_DATE and self.activity and progress:
            resumption = self.activity.resumption()
            progress = f"interrupted; {resumption}" if resumption else f"interrupted at {progress}"
        details = "; ".join(filter(None, (progress, dvc.summarize(self.reasons))))
        return format_row(self.stage, f"{self.state:<11} {details}")


@dataclass(frozen=True)
class Status:
    """State of the project."""

    holder: str  # the command, or DVC, that uses the project; "" if none does
    rows: list[Row]
    leftovers: list[str] = field(default_factory=list)  # artifacts that no stage writes

    def to_json(self) -> dict[str, Any]:
        """Return the status as JSON values."""
        rows = [row.to_json() for row in self.rows]
        return {"in_use_by": self.holder or None, "stages": rows, "leftovers": self.leftovers}

    def text(self) -> str:
        """Format the status as lines."""
        lines = [row.text() for row in self.rows]
        if self.leftovers:
            names = first_few(self.leftovers)
            lines.append(wrap(f"Left by stages that params.yaml no longer has: {names}. Delete what you do not need."))
        return "\n".join([*lines, wrap(f"In use by {self.holder}")] if self.holder else lines)

    def key(self) -> Any:
        """Return what has changed if anything but an age or a rate has."""
        steps = [(row.activity.progress, row.activity.checkpoint_step) if row.activity else () for row in self.rows]
        return self.holder, [(row.state, row.reasons) for row in self.rows], steps


class StatusReader:
    """Reader of the status. DVC is asked again only if a file that it compares, or the state of a run, has changed."""

    def __init__(self, runs: Path = stage_runner.RUNS):
        self.runs = runs
        self._files_key: Any = None
        self._dvc_key: Any = None
        self._dvc_reasons: dict[str, list[str]] | None = None  # None: DVC is busy
        self._dvc_holder = ""

    def read(self) -> Status:
        """Read the status. Raises UserError if params.yaml is invalid or DVC cannot compute its status."""
        if (files_key := _modification_times(params.FILE, dvc_yaml.FILE)) != self._files_key:
            self._data = params.read()
            self._settings = params.check(self._data)
            require_project_outside(Path(self._settings.dataset.source))
            self._stages = dvc_yaml.stages(self._data)
            self._files_key = files_key
        settings, stages = self._settings, self._stages
        running = {name: activity.running_activity(self.runs / stage.cli_name) for name, stage in stages.items()}
        holder = locks.owner(self.runs)
        states = run_state.read(self.runs) if holder else {}
        if not states:
            self._ask_dvc((holder, *running.values()))
        rows = []
        for name, stage in stages.items():
            stage_activity = running[name]
            reasons: list[str] = []
            if stage_activity:
                state = run_state.RUNNING
            elif states:
                state = states.get(stage.cli_name, UNKNOWN)
                reasons = [] if stage.cli_name in states else ["not part of this run"]
                state = run_state.WAITING if state == run_state.RUNNING else state  # its process is just starting
            elif self._dvc_reasons is None:
                state, reasons = UNKNOWN, ["DVC is busy"]
            elif name in self._dvc_reasons:
                state, reasons = OUT_OF_DATE, self._dvc_reasons[name]
                stage_activity = activity.interrupted_activity(self.runs / stage.cli_name, stage, settings)
            else:
                state = run_state.UP_TO_DATE
            if pinned := result_versions.describe_pinned(stage, settings):
                reasons = [*reasons, pinned]
            rows.append(Row(stage.cli_name, state, reasons, stage_activity))
        owners = [stage_activity.owner for stage_activity in running.values() if stage_activity]
        leftovers = dvc_yaml.leftover_artifacts(stages.values())
        return Status(holder or next(iter(owners), self._dvc_holder), rows, leftovers)

    def _ask_dvc(self, owners: tuple[Any, ...]) -> None:
        """Ask DVC which stages are out of date."""
        key = (*_modification_times(params.FILE, dvc_yaml.FILE, dvc_yaml.LOCK), *(bool(owner) for owner in owners))
        if key == self._dvc_key:
            return
        self._dvc_holder = ""
        try:
            versions = result_versions.compute(self._data, self._settings)
            self._dvc_reasons = dvc.out_of_date_reasons(self._stages, versions)
            self._dvc_key = key
        except UserError as error:
            if not error.what.startswith(locks.BUSY):
                raise
            self._dvc_reasons, self._dvc_key = None, None  # DVC locks outputs while a stage runs
            self._dvc_holder = error.what.removeprefix(f"{locks.BUSY}: ").rstrip(".")


def _modification_times(*paths: Path) -> tuple[int, ...]:
    return tuple(path.stat().st_mtime_ns if path.exists() else 0 for path in paths)


def show(*, as_json: bool, watch: bool = False) -> int:
    """Print the state of each stage, once or again and again until Ctrl-C; return the exit status.

    Raises UserError if DVC cannot compute its status.
    """
    warn_drift()
    reader = StatusReader()
    if watch:
        with suppress(KeyboardInterrupt):  # the usual end
            _watch(reader.read, as_json=as_json)
        return 0
    status = reader.read()
    print(json.dumps(status.to_json(), indent=1, ensure_ascii=False) if as_json else status.text())
    return 0


def _watch(read: Callable[[], Status], *, as_json: bool, wait: Callable[[float], None] = time.sleep) -> None:
    """Refresh the status in place on a terminal; otherwise print it whenever it changes, as JSON in one line."""
    if sys.stdout.isatty() and not as_json:
        from rich.live import Live
        from rich.text import Text

        with Live(Text("Asking DVC for the status."), auto_refresh=False) as live:
            while True:
                live.update(Text(read().text()), refresh=True)
                wait(WATCH_INTERVAL_S)
    previous = None
    while True:
        status = read()
        if status.key() != previous:
            previous = status.key()
            print(json.dumps(status.to_json(), ensure_ascii=False) if as_json else f"{status.text()}\n", flush=True)
        wait(WATCH_INTERVAL_S)
