"""Activity of a stage: progress, newest checkpoint and the process that runs it, read from its folders in runs/."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeline import dvc_yaml, locks
from pipeline.fingerprint import work_folder
from stages.config import Params
from stages.errors import UserError
from stages.formats import artifact
from stages.tracking.journal import JOURNAL_FILE, end_status
from stages.tracking.progress_file import PROGRESS_FILE, read_progress
from stages.tracking.quantities import ProgressState, format_duration, format_named

# Numbers of a training that tell what it waits for and how well it uses its devices.
SHOWN = ("images/s", "data %", "reduce %", "memory GB", "MFU %")
STALE_PROGRESS_S = 60.0  # older progress of a running stage is shown with its age


@dataclass(frozen=True)
class Activity:
    """Progress and newest checkpoint of one execution of a stage."""

    owner: str  # process that runs the stage; "" if none does
    progress: ProgressState | None
    progress_age_s: float
    checkpoint_step: int | None
    checkpoint_age_s: float

    def describe(self) -> list[str]:
        """Describe the activity, most important first."""
        texts = []
        if self.progress:
            texts = [f"{self.progress.count} ({self.progress.percentage})"]
            if self.owner and self.progress.is_moving:
                texts += [self.progress.time_left, self.progress.formatted_rate]
                numbers = self.progress.numbers
                texts += [format_named(name, numbers[name]) for name in SHOWN if name in numbers]
            if self.owner and self.progress_age_s > STALE_PROGRESS_S:
                texts.append(f"no progress for {format_duration(self.progress_age_s)}")
        elif self.owner:
            texts = ["starting"]
        if self.checkpoint_step is not None:
            texts.append(f"checkpoint of step {self.checkpoint_step:,} is {format_duration(self.checkpoint_age_s)} old")
        return texts

    def resumption(self) -> str:
        """Return the step at which a training resumes, which may be earlier than its progress; "" if unknown."""
        if self.checkpoint_step is None:
            return ""
        total = f" of {self.progress.total:,.0f}" if self.progress and self.progress.unit == "step" else ""
        age = format_duration(self.checkpoint_age_s)
        return f"resumes at step {self.checkpoint_step:,}{total} (checkpoint is {age} old)"

    def to_json(self) -> dict[str, Any]:
        """Return the activity as JSON values."""
        progress = self.progress
        return {
            "owner": self.owner or None,
            "progress": progress
            and {
                **asdict(progress),
                "rate": progress.rate or None,
                "remaining_s": progress.remaining_s if self.owner else None,
                "age_s": self.progress_age_s,
            },
            "checkpoint": None
            if self.checkpoint_step is None
            else {"step": self.checkpoint_step, "age_s": self.checkpoint_age_s},
        }


def running_activity(folder: Path, clock: Callable[[], float] = time.time) -> Activity | None:
    """Return the activity of the stage with this folder in runs/; None if no process runs it."""
    owner = locks.owner(folder)
    if not owner:
        return None
    started_s = (folder / locks.LOCK_FILE).stat().st_mtime
    files = [path for name in (PROGRESS_FILE, f"tracked/*/{JOURNAL_FILE}") for path in folder.glob(f"*/{name}")]
    newest = max(files, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None or newest.stat().st_mtime < started_s:
        return Activity(owner, None, 0.0, None, 0.0)
    return _read(folder / newest.relative_to(folder).parts[0], owner, clock(), started_s)


def interrupted_activity(
    folder: Path, stage: dvc_yaml.Stage, settings: Params, clock: Callable[[], float] = time.time
) -> Activity | None:
    """Return the activity of an unfinished execution that the next run would resume; None if there is none."""
    try:
        work = work_folder(folder, stage, settings)
    except UserError:  # an input is missing, so the fingerprint is unknown
        return None
    # Names in tracked/ begin with the start time, so the largest is the newest.
    journal = max(work.glob(f"tracked/*/{JOURNAL_FILE}"), default=None)
    if journal is None or end_status(journal) == "FINISHED":
        return None
    activity = _read(work, "", clock(), 0.0)
    return activity if activity.progress or activity.checkpoint_step is not None else None


def _read(work: Path, owner: str, now_s: float, started_s: float) -> Activity:
    progress, progress_s = read_progress(work) or (None, 0.0)
    if progress_s < started_s:  # written by an earlier execution
        progress = None
    manifests = {
        int(path.parent.name.partition("-")[2]): path.stat().st_mtime
        for path in work.glob(f"step-*/{artifact.MANIFEST}")
        if path.parent.name.partition("-")[2].isdecimal()  # not step-000000004.damaged
    }
    step = max(manifests, default=None)
    if progress and step is not None and progress.unit == "step" and step > progress.done:
        progress = replace(progress, done=step)  # a stopped run saves a step that its progress does not show yet
    age_s = 0.0 if step is None else now_s - manifests[step]
    return Activity(owner, progress, now_s - progress_s, step, age_s)
