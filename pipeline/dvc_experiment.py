"""Refusal of a `dvc exp run` that would change the dataset or the preset although the command does not ask for it.

`dvc exp run -S` composes conf/ again, so choices that are not repeated return to the defaults. Hydra asks this module
before DVC writes params.yaml (pipeline/compose.py), so a refusal leaves the project as it was.
"""

import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline import params
from pipeline.composed_from import CONF, choices_of, format_override, is_edited, key_of, overrides_of
from pipeline.group_files import default_choice
from pipeline.last_run import Change, compare
from pipeline.text import first_few
from stages.errors import UserError

DVC_MODULE = "dvc.utils.hydra"  # loaded only in a process of DVC that composes conf/


def is_composing() -> bool:
    """Return whether this is a process of `dvc exp run`."""
    return DVC_MODULE in sys.modules


def require_asked(composed: Mapping[str, Any], arguments: Sequence[str] = sys.argv[1:]) -> None:
    """Raise UserError if the composition changes the dataset or the preset of params.yaml unasked.

    `composed` is the new contents of params.yaml, `arguments` are those of the dvc command.
    """
    if not params.FILE.is_file():
        return
    before = params.read()
    unasked = unasked_changes(before, composed)
    if not unasked:
        return
    options = list(arguments[2:]) if list(arguments[1:2]) == ["run"] else []
    repeated = _command(_former_overrides(before, composed, unasked), options)
    named = _command(_named_choices(composed, unasked), options)
    raise UserError(
        f"dvc exp run composes {CONF}/ and would change the dataset or the preset, which this command does not name: "
        f"{first_few([str(change) for change in unasked])}.",
        where=params.FILE,
        fix=f"To keep them: {repeated}\n       To change them: {named}",
        code=2,
    )


def unasked_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """Return the changes of dataset and preset that neither an override nor an edit of conf/ asks for."""
    asked, dropped = _keys(after), _keys(before) - _keys(after)
    data_set_dropped = any(map(_is_data_set, dropped))
    changes = compare(before, after)
    changed = {change.key for change in changes}
    is_new_preset = "experiment" in asked & changed
    is_new_data_set = "dataset" in asked & changed or (
        # a preset brings its dataset, unless it leaves the default in place of one that was chosen
        is_new_preset and not (data_set_dropped and choices_of(after).get("dataset") == default_choice(CONF, "dataset"))
    )
    is_fallback = data_set_dropped or "experiment" in dropped or is_edited(before)
    unasked = [
        change
        for change in changes
        if change.key not in asked
        and (
            (change.key == "experiment" and "experiment" in dropped)
            or (_is_data_set(change.key) and is_fallback and not is_new_data_set)
        )
    ]
    return sorted(unasked, key=lambda change: "." in change.key)  # first the choices, then the settings


def _keys(data: Mapping[str, Any]) -> set[str]:
    return {key_of(override) for override in overrides_of(data)}


def _is_data_set(key: str) -> bool:
    return key.partition(".")[0] == "dataset"


def _former_overrides(before: Mapping[str, Any], after: Mapping[str, Any], unasked: Sequence[Change]) -> list[str]:
    """Return the overrides that bring back the former dataset and preset: those of params.yaml, then edits of it."""
    repeated = {
        key_of(override): override
        for override in overrides_of(before)
        if (key_of(override) == "experiment" or _is_data_set(key_of(override))) and key_of(override) not in _keys(after)
    }
    if is_edited(before):
        for change in unasked:
            if "." in change.key and change.before is not None:
                repeated[change.key] = format_override(change.key, change.before)
    return list(repeated.values())


def _named_choices(after: Mapping[str, Any], unasked: Sequence[Change]) -> list[str]:
    """Return the overrides that name the new dataset and preset."""
    groups = [group for group in ("experiment", "dataset") if any(_group(change.key) == group for change in unasked)]
    return [format_override(group, choices_of(after).get(group)) for group in groups]


def _group(key: str) -> str:
    return key.partition(".")[0]


def _command(overrides: Sequence[str], options: Sequence[str]) -> str:
    choices = [argument for override in overrides for argument in ("-S", override)]
    return shlex.join(["dvc", "exp", "run", *choices, *options])
