"""params.yaml, read in one place and checked whole before anything runs.

The dataclasses of models/config.py and stages/config.py say what a section may hold. What is wrong is said in the
words of the file, with the nearest key that exists.
"""

import dataclasses
import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer, ComposerError
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import AliasEvent
from ruamel.yaml.nodes import Node

from stages.config import Params
from stages.errors import UserError
from stages.formats import artifact
from stages.formats.config_schema import adapter

FILE = Path("params.yaml")
MAX_BYTES = 1_000_000
MAX_ERRORS = 5


class _NoAliases(Composer):
    """Refuses what stands for another value: a few lines of it can stand for more than any memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Node | None:
        if self.parser.check_event(AliasEvent):
            raise ComposerError(problem="aliases are not read", problem_mark=self.parser.peek_event().start_mark)
        return super().compose_node(parent, index)


def load(path: Path = FILE) -> Params:
    """Read and check params.yaml."""
    return check(read(path), path)


def read(path: Path = FILE) -> dict[str, Any]:
    """Read a YAML mapping as DVC reads it. Duplicate keys and aliases are refused."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer = _NoAliases
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(
                f"The file holds {path.stat().st_size} bytes.",
                where=path,
                fix=f"Settings fit in {MAX_BYTES} bytes; is this the right file?",
                code=2,
            )
        data = yaml.load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            "The file is missing.", where=path.absolute(), fix=f"Make the file anew: {_maker(path)}", code=2
        ) from None
    except UnicodeDecodeError:
        raise UserError("The file is not UTF-8 text.", where=path, fix="Save it as UTF-8.", code=2) from None
    except (YAMLError, ValueError, RecursionError) as error:  # the last two: !!int x, and 2,000 brackets
        mark = getattr(error, "problem_mark", None)
        problem = (getattr(error, "problem", None) or str(error)).splitlines()[0]
        raise UserError(
            f"The file is not valid YAML: {problem}.",
            where=f"{path}, line {mark.line + 1}" if mark else path,
            fix=f"Mend that line, or make the file anew: {_maker(path)}",
            code=2,
        ) from None
    if not isinstance(data, dict):
        raise UserError("The file holds no settings.", where=path, fix=f"Make the file anew: {_maker(path)}", code=2)
    return data


def _maker(path: Path) -> str:
    return "vqvae2 config --write" if path == FILE else f"git checkout {path}"


def write(text: bytes, path: Path = FILE) -> None:
    """Put text in the file, whole or not at all."""
    with artifact.atomic_write(path) as whole:
        whole.write_bytes(text)


def check(data: Mapping[str, Any], path: Path | str = FILE) -> Params:
    """Check settings: their names, their types, each section by itself, and the sections against each other.

    `path` is where a mistake is said to be.
    """
    try:
        # As JSON, so that strict means "no text for a number" and not "no mapping for a dataclass".
        text = json.dumps(data, default=str, ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:  # a list for a key, a number of 5,000 digits, half a character
        raise UserError(
            f"The settings hold what JSON cannot: {error}.",
            where=path,
            fix="Use names for keys, and text, numbers and lists for values.",
            code=2,
        ) from None
    try:
        params = adapter(Params).validate_json(text, strict=True)
    except ValidationError as error:
        raise _together([to_user_error(dict(found)) for found in error.errors()[:MAX_ERRORS]], path) from None
    for what, where, fix in _contradictions(params):
        raise UserError(what, where=f"{path}: {where}", fix=fix, code=2)
    # Coarse to fine, whatever the order in the file.
    return dataclasses.replace(params, priors={level: params.priors[level] for level in params.vqvae.levels})


def flat(section: Any, prefix: str = "") -> dict[str, Any]:
    """Name every single setting by its full key: vqvae.levels.top.stride."""
    if dataclasses.is_dataclass(section) and not isinstance(section, type):
        section = dataclasses.asdict(section)
    if not isinstance(section, Mapping) or not section:
        return {prefix: section}
    found: dict[str, Any] = {}
    for key, value in section.items():
        found |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Name each single setting that two flat mappings have differently, with both values."""
    for key in {**old, **new}:
        if old.get(key) != new.get(key):
            yield f"{key} {format_value(old.get(key))} -> {format_value(new.get(key))}"


def format_value(value: Any) -> str:
    return "(none)" if value is None else json.dumps(value, ensure_ascii=False, default=str)


def _together(letters: Sequence[tuple[str, str, str]], path: Path | str) -> UserError:
    """Make one letter of all: what is wrong line by line, and then how to mend it, each by its key."""
    fixes = list(dict.fromkeys(fix for _, _, fix in letters))
    if len(fixes) > 1:
        fixes = [f"{key}: {fix[:1].lower()}{fix[1:]}" if key else fix for key, _, fix in letters]
    return UserError("\n".join(what for _, what, _ in letters), where=path, fix="\n       ".join(fixes), code=2)


def to_user_error(error: dict[str, Any]) -> tuple[str, str, str]:
    """Turn one finding of pydantic into the key, what is wrong, and the fix."""
    key = ".".join(str(step) for step in error["loc"])
    given = json.dumps(error.get("input"), default=str, ensure_ascii=False)
    if len(given) > 60:
        given = given[:57] + "..."
    match error["type"]:
        case "unexpected_keyword_argument" | "extra_forbidden":
            near = nearest(key)
            return key, f"{key} is not a setting.", f"Did you mean {near}?" if near else f"Remove {key}."
        case "missing" | "missing_argument" | "missing_keyword_only_argument":
            return key, f"{key} is missing.", "Compose the file anew: vqvae2 config --write"
        case "value_error":
            what, fix = split(str(error["ctx"]["error"]))
            fix = fix or "Choose values that go together."
            if named := re.match(r"(\w+) is ", what):  # a field of this section, not the section as a whole
                return f"{key}.{named[1]}".lstrip("."), f"{key}.{what}".lstrip("."), fix
            return key, f"{key}: {what}".removeprefix(": "), fix
        case "dataclass_type" | "dict_type":
            inside = ", ".join(within(key) or within(f"{key}.LEVEL"))
            return key, f"{key} is {given}; it holds settings of its own.", f"Set what it holds: {inside}"
        case _:
            return key, f"{key} is {given}.", f"Use {error['msg'].removeprefix('Input should be ')}."


def split(sentence: str) -> tuple[str, str]:
    """Part what a setting's own check says into what is wrong and, behind a semicolon, the fix."""
    what, _, fix = sentence.partition("; ")
    return f"{what}.", f"{fix[:1].upper()}{fix[1:]}." if fix else ""


def within(key: str) -> list[str]:
    """Name the settings that a section holds."""
    parts = [name.rpartition(".") for name in _keys(Params, "")]
    return [f"{key}.{leaf}".lstrip(".") for parent, _, leaf in parts if parent == _general(key)]


def nearest(key: str) -> str:
    """Name the setting whose name is closest to an unknown one; "" if none is close."""
    parent, _, leaf = key.rpartition(".")
    # Far from where it was looked for, only a slip of the pen counts.
    for candidates, alike in ((within(parent), 0.6), (list(_keys(Params, "")), 0.8)):
        by_leaf = {name.rpartition(".")[2]: name for name in reversed(candidates)}
        if close := difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=alike):
            return by_leaf[close[0]]
    return ""


def _general(key: str) -> str:
    """Replace the names of levels, which are the user's own, by LEVEL."""
    steps = key.split(".")
    for number in range(1, len(steps)):
        if steps[number - 1] in ("levels", "priors"):
            steps[number] = "LEVEL"
    return ".".join(steps)


def _keys(kind: Any, prefix: str) -> Iterator[str]:
    for name, hint in get_type_hints(kind).items():
        key = f"{prefix}{name}"
        yield key
        if dataclasses.is_dataclass(hint):
            yield from _keys(hint, f"{key}.")
        elif get_origin(hint) is not None:
            for argument in filter(dataclasses.is_dataclass, get_args(hint)):
                yield from _keys(argument, f"{key}.LEVEL.")


def _contradictions(params: Params) -> Iterator[tuple[str, str, str]]:
    """What each section may say, but not together: the sentence, the key, the fix."""
    levels, priors = params.vqvae.levels, params.priors
    try:
        params.vqvae.grids(params.dataset.image_size)
    except ValueError as error:
        what, fix = split(str(error))
        yield what, "dataset.image_size", fix
    for level in levels:
        if level not in priors:
            yield (
                f"vqvae.levels has {_names(levels)}; priors has {_names(priors)}.",
                "priors",
                f"Add one: -S '+prior@priors.{level}=pixelcnn'",
            )
    for level in priors:
        if level not in levels:
            yield (
                f"priors has {_names(priors)}; vqvae.levels has {_names(levels)}.",
                f"priors.{level}",
                f"Add the level {level} to vqvae.levels, or leave out its prior: -S '~prior@priors.{level}'",
            )
    entries = max(level.entries for level in levels.values())
    if params.sample.top_k > entries:
        yield (
            f"sample.top_k is {params.sample.top_k}, but no level has more than {entries} entries.",
            "sample.top_k",
            f"Use 1 to {entries}, or 0 to keep all.",
        )
    yield from _indivisible("train_vqvae.batch_size", params.train_vqvae.batch_size, params.cluster.workers)
    for level, prior in priors.items():
        yield from _indivisible(f"priors.{level}.train.batch_size", prior.train.batch_size, params.cluster.workers)


def _indivisible(key: str, batch_size: int, workers: int) -> Iterator[tuple[str, str, str]]:
    if batch_size % workers:
        below = batch_size // workers * workers
        yield (
            f"{key} is {batch_size}, which {workers} workers cannot share evenly.",
            key,
            f"Use {f'{below} or ' if below else ''}{below + workers}, or another number of cluster.workers.",
        )


def _names(mapping: Mapping[str, Any]) -> str:
    return ", ".join(mapping) or "nothing"
