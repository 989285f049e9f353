"""Explanations of group files in conf/ that Hydra composes to something else than meant, or not at all."""

import re
from collections.abc import Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

from pipeline import conf_layers, params
from stages.errors import UserError

PRESET_GROUPS = ("experiment", "critic")  # their files set any section
GLOBAL_LINE = "# @package _global_"  # makes Hydra place the settings of a file at the top level


def explain(conf: Path, choices: Mapping[str, Any]) -> UserError | None:
    """Explain the first chosen file of `conf` with a common mistake; None if there is none.

    `choices` maps groups to files, such as experiment to mine, or prior@priors.top to pixelcnn.
    """
    for key, choice in choices.items():
        path = conf / key.partition("@")[0] / f"{choice}.yaml"
        if path.is_file():
            problems = _of_preset if key in PRESET_GROUPS else _of_group
            if error := next(problems(path, key, _groups(conf)), None):
                return error
    return None


def default_choice(conf: Path, group: str) -> Any:
    """Return the choice of a group in the defaults list of the primary config; None if it has none."""
    return _default_choices(conf).get(group)


def _of_preset(path: Path, _: str, groups: Mapping[str, str]) -> Iterator[UserError]:
    if not _is_global(path):
        yield UserError(
            f"{path.name} does not begin with the line `{GLOBAL_LINE}`, so its settings are placed under `experiment`.",
            where=f"{path}, line 1",
            fix=f"Insert this as the first line, above other comments: {GLOBAL_LINE}",
            code=2,
        )
        return
    for item in _defaults(path):
        for name, choice in item.items():
            group = name.split()[-1].lstrip("/")
            if group in groups.values() and name != f"override /{group}":
                yield _wrong_form(path, f"- {name}: {choice}", group, choice)
    for package, group in groups.items():
        choice = params.look_up(params.read(path), package)
        if isinstance(choice, str):
            yield _wrong_form(path, f"{package.rpartition('.')[2]}: {choice}", group, choice)


def _wrong_form(path: Path, line: str, group: str, choice: Any) -> UserError:
    return UserError(
        f"`{line}` does not choose another file of the group {group}.",
        where=path,
        fix=f"Write it in the list under `defaults:` as: - override /{group}: {choice}",
        code=2,
    )


def _of_group(path: Path, key: str, groups: Mapping[str, str]) -> Iterator[UserError]:
    package = next((package for package, group in groups.items() if group == key), key)
    is_nested = params.look_up(params.read(path), package) is not None
    if _is_global(path) and not is_nested:
        yield UserError(
            f"The line `{GLOBAL_LINE}` places the settings of {path.name} at the top level, not under `{package}`.",
            where=path,
            fix="Remove that line.",
            code=2,
        )
    elif is_nested and not _is_global(path):
        yield UserError(
            f"{path.name} repeats the name of its section, so its settings are placed under `{package}.{package}`.",
            where=path,
            fix=f"Remove the line `{package}:` and the indentation below it.",
            code=2,
        )


def _is_global(path: Path) -> bool:
    """Return whether the header of a file has the line. Like Hydra, skip blank lines and stop at any other comment."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    header = takewhile(lambda line: re.match(r"#\s*@", line), filter(None, map(str.strip, lines)))
    return any(line.lstrip("#").split() == GLOBAL_LINE.lstrip("#").split() for line in header)


def _default_choices(conf: Path) -> dict[str, Any]:
    """Return the choice of each group without overrides."""
    files = conf_layers.primary_files(conf)
    return {group: choice for path in files for group, choice in conf_layers.choices_of(params.read(path)).items()}


def _defaults(path: Path) -> list[dict[str, Any]]:
    """Return the items of a defaults list that choose a file of a group."""
    return [item for item in params.read(path).get("defaults", ()) if isinstance(item, dict)]


def _groups(conf: Path) -> dict[str, str]:
    """Map the sections that the primary config chooses files for to their groups: priors.top to prior@priors.top.

    A preset is no section.
    """
    return {name.rpartition("@")[2]: name for name in _default_choices(conf) if name != "experiment"}
