"""Reasons why a stage is out of date: changes that DVC reports, and its result version, in terms of the user."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline import dvc_yaml, params, result_versions
from stages.formats.flatten import flatten

NEVER_RUN = "it has not run yet"
NOT_RECORDED = f"it is frozen in {dvc_yaml.FILE}, and DVC has not recorded it yet"
# States of a path in `dvc status`, reworded: DVC says "deleted" of a path that may never have existed.
PATH_STATES = {"deleted": "does not exist", "not in cache": "is not in the cache"}


def describe_changes(
    changes: Sequence[Any],
    name: str,
    lock: Mapping[str, Any],
    settings: Mapping[str, Any],
    earlier: Sequence[dvc_yaml.Stage],
) -> Iterator[str]:
    """Describe DVC's changes of one stage. A missing input that an `earlier` stage will write is not a reason."""
    if name not in lock and changes:
        yield NEVER_RUN
        return
    for change in changes:
        if change == "changed command":
            yield "its command changed"
            continue
        for kind, paths in change.items() if isinstance(change, dict) else ():
            for path, state in paths.items():
                if path == result_versions.FILE.as_posix():
                    continue  # compared by describe_version
                if isinstance(state, dict):
                    yield from _changed_settings(state, lock[name].get("params", {}).get(path, {}), settings)
                elif kind == "changed outs" or not (
                    state == "deleted" and any(stage.writes(path) for stage in earlier)
                ):
                    yield f"{path} {PATH_STATES.get(state, f'was {state}')}"


def describe_version(stage: dvc_yaml.Stage, entry: Mapping[str, Any], versions: Mapping[str, str]) -> str:
    """Say why the result version of a stage is not the one in its entry of dvc.lock; "" if it is."""
    recorded = entry.get("params", {}).get(result_versions.FILE.as_posix(), {}).get(stage.cli_name)
    version = versions.get(stage.cli_name, recorded)
    return result_versions.describe_change(recorded, version) if version != recorded else ""


def _changed_settings(
    changed: Mapping[str, str], before: Mapping[str, Any], settings: Mapping[str, Any]
) -> Iterator[str]:
    """Describe changed settings by their full keys, with both values, the largest changes first."""
    old: dict[str, Any] = {}
    new: dict[str, Any] = {}
    for key in changed:
        old |= flatten(before.get(key), key)
        new |= flatten(params.look_up(settings, key), key)
    keys = sorted({**old, **new}, key=lambda key: _change_size(old.get(key), new.get(key)), reverse=True)
    yield from params.changes({key: old.get(key) for key in keys}, {key: new.get(key) for key in keys})


def _change_size(old: Any, new: Any) -> float:
    """Return the size of a setting's change: the ratio of positive numbers; infinity for anything else."""
    are_numbers = all(isinstance(value, int | float) and value > 0 for value in (old, new))
    return abs(math.log(new / old)) if are_numbers else math.inf
