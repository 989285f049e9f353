"""Comparison of a run's settings with those of the run before, and the record of the last run.

The record is runs/last_run.yaml: the contents of params.yaml, and how they differ from those of the run before.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import composed_from, params
from pipeline.process import is_temporary_copy
from pipeline.text import format_value, shorten
from stages.errors import UserError
from stages.formats.flatten import flatten

RECORD = Path("runs/last_run.yaml")
CHOICES = f"{composed_from.SECTION}.choices."  # prefix of the choices of groups, such as composed_from.choices.dataset
MAX_LINES = 10
# Sections and groups of conf/ by the consequence of a change, the largest first.
FIRST = ("dataset", "experiment")
SECTIONS = (
    "vqvae",
    "train_vqvae",
    "priors",
    "augment",
    "codes",
    "seed",
    "sample",
    "evaluate",
    "classifiers",
    "rejections",
    "keep_results",
)
LAST = ("cluster",)


class Change(NamedTuple):
    """One setting that differs between two runs. A value is None if the run does not have the setting."""

    key: str  # such as "train_vqvae.steps", or the name of a group in conf/, such as "experiment"
    before: Any
    after: Any

    def __str__(self) -> str:
        before, after = (
            "(none)" if value is None else shorten(format_value(value)) for value in (self.before, self.after)
        )
        return f"{self.key} {before} -> {after}"


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """Compare two contents of params.yaml: dataset, preset, other choices of groups, settings, cluster last.

    Choices are compared only if both contents have them.
    """
    old, new = _settings(before), _settings(after)
    groups = {key.removeprefix(CHOICES) for key in {**new, **old} if key.startswith(CHOICES)}
    have_choices = all(any(key.startswith(CHOICES) for key in values) for values in (old, new))
    differences = [
        Change(key.removeprefix(CHOICES), old.get(key), new.get(key))
        for key in {**new, **old}
        if old.get(key) != new.get(key) and (have_choices or not key.startswith(CHOICES))
    ]
    return sorted(differences, key=lambda change: _rank(change.key, is_choice=change.key in groups))


def _settings(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return flat settings and choices, without the other entries of the section composed_from."""
    return {
        key: value
        for key, value in flatten(data).items()
        if key.startswith(CHOICES) or key.partition(".")[0] != composed_from.SECTION
    }


def _rank(key: str, *, is_choice: bool) -> tuple[int, int, bool]:
    section = key.partition(".")[0]
    if section in FIRST:
        return (0, FIRST.index(section), not is_choice)
    if section in LAST:
        return (3, 0, not is_choice)
    if is_choice:
        return (1, 0, False)
    return (2, SECTIONS.index(section) if section in SECTIONS else len(SECTIONS), False)


def describe(changes: Sequence[Change]) -> str:
    """Describe what a run changes in at most ten lines; "" without changes."""
    if not changes:
        return ""
    shown = changes if len(changes) < MAX_LINES else changes[: MAX_LINES - 2]
    lines = ["Changes against the last run:", *(f"  {change}" for change in shown)]
    if len(shown) < len(changes):
        lines.append(f"  and {len(changes) - len(shown)} more settings")
    return "\n".join(lines)


def since_last_run(data: Mapping[str, Any]) -> list[Change]:
    """Compare the contents of params.yaml with those of the last run; no changes if there was no run."""
    before = _read().get("settings")
    return compare(before, data) if before else []


def of_recorded_run() -> list[Change]:
    """Return how the settings of the last recorded run differ from those of the run before."""
    return [Change(*change) for change in _read().get("changes", ())]


def record_run(data: Mapping[str, Any]) -> None:
    """Record the contents of params.yaml as those of the last run.

    A repeated run, such as one that resumes, keeps the changes that were recorded for it.
    """
    record = _read()
    if record.get("settings") == data or is_temporary_copy():
        return
    changes = [list(change) for change in since_last_run(data)]
    RECORD.parent.mkdir(exist_ok=True)
    params.write(params.to_yaml({"changes": changes, "settings": dict(data)}).encode(), RECORD)


def _read() -> Mapping[str, Any]:
    """Read the record of the last run; {} if there is none, or if it is damaged.

    An experiment in a temporary copy of the project uses the record of the project.
    """
    path = Path(os.environ.get("DVC_ROOT", "."), RECORD) if is_temporary_copy() else RECORD
    with suppress(OSError, UserError):
        record = params.read(path)
        settings, recorded = record.get("settings"), record.get("changes")
        are_changes = isinstance(recorded, list) and all(
            isinstance(change, list) and len(change) == len(Change._fields) and isinstance(change[0], str)
            for change in recorded
        )
        if isinstance(settings, Mapping) and are_changes:
            return record
    return {}
