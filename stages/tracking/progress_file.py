"""Progress of a stage in a small file in its work folder, for `vqvae2 status` in another process.

WORK/progress.json    {"time": seconds since 1970, "done": ..., "total": ..., "unit": ..., "rate": ..., "numbers": {}}
"""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from stages.runtime.context import Reporter
from stages.tracking.quantities import ProgressState, RateEstimator

PROGRESS_FILE = "progress.json"
MIN_INTERVAL_S = 1.0  # between two writes


class ProgressFile(Reporter):
    """Reporter that keeps the newest progress in a file. A failed write raises nothing: the run must go on."""

    def __init__(
        self, work_dir: Path, clock: Callable[[], float] = time.time, timer: Callable[[], float] = time.monotonic
    ):
        self._path = work_dir / PROGRESS_FILE
        self._clock, self._timer = clock, timer
        self._rate = RateEstimator(timer)
        self._unit = ""
        self._last_write_s = float("-inf")

    def progress(self, done: float, total: float, unit: str, numbers: Mapping[str, float]) -> None:
        if unit != self._unit:
            self._rate, self._unit = RateEstimator(self._timer), unit
        self._rate.update(done)
        if done < total and self._timer() - self._last_write_s < MIN_INTERVAL_S:
            return
        self._last_write_s = self._timer()
        state = ProgressState(done, total, unit, self._rate.rate, dict(numbers))
        temporary = self._path.with_name(f".{PROGRESS_FILE}")  # without fsync: after a power failure nothing runs
        with suppress(OSError):
            temporary.write_text(json.dumps({"time": self._clock(), **asdict(state)}), encoding="utf-8")
            temporary.replace(self._path)


def read_progress(work_dir: Path) -> tuple[ProgressState, float] | None:
    """Return the newest progress in a work folder and its time in seconds since 1970; None if there is none."""
    try:
        values = json.loads((work_dir / PROGRESS_FILE).read_text(encoding="utf-8"))
        time_s = float(values.pop("time"))
        return ProgressState(**values), time_s
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return None
