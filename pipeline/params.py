"""Reader and validator of params.yaml. All settings are validated before anything runs.

The dataclasses of models/config.py and stages/config.py declare the settings. An error names the full key, the rule and
the value, and suggests the nearest valid key for an unknown one.
"""

import copy
import dataclasses
import difflib
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer, ComposerError
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import AliasEvent
from ruamel.yaml.nodes import Node
from ruamel.yaml.representer import SafeRepresenter

from pipeline.conflicts import Problem, conflicts, explain
from pipeline.text import capitalize, format_value, shorten, shorten_middle
from stages.config import ComposedFrom, Params
from stages.errors import UserError
from stages.formats import artifact
from stages.formats.config_schema import adapter

FILE = Path("params.yaml")
MAX_BYTES = 1_000_000  # far more than any params.yaml, dvc.yaml or dvc.lock has
MAX_ERRORS = 5  # in one message
NAMED_BY_USERS = ("evaluate.networks",)  # mappings whose keys are names of the user's choice
SAME_SECTION_SIMILARITY = 0.6  # difflib's ratio for a suggestion from the section of the unknown key
PAIR = "tuple[int, int]"  # pydantic's name of the type
OTHER_SECTION_SIMILARITY = 0.8  # for one from any section: only a typing error counts


# Mapping whose keys users choose -> what stands for a key in the names of settings.
PLACEHOLDERS = {
    "levels": "LEVEL",
    "priors": "LEVEL",
    "level_rules": "LEVEL",
    "stages": "STAGE",
    "classifiers": "ARTIFACT",
    "rejections": "ARTIFACT",
}


class _NoAliases(Composer):
    """YAML composer that rejects aliases: nested aliases in a few lines can expand to more than the memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Node | None:
        if self.parser.check_event(AliasEvent):
            raise ComposerError(problem="aliases are not supported", problem_mark=self.parser.peek_event().start_mark)
        return super().compose_node(parent, index)


class _NoAliasRepresenter(SafeRepresenter):
    """YAML representer that writes a repeated value in full, because `read` rejects aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def load(path: Path = FILE) -> Params:
    """Read and validate params.yaml. Raises UserError if it is invalid."""
    return check(read(path), path)


def read(path: Path = FILE) -> dict[str, Any]:
    """Read a YAML mapping with DVC's parser.

    Raises UserError if the file is missing, too large, not UTF-8 or not a YAML mapping, or if it has duplicate keys or
    aliases.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(
                f"{path.name} must be at most {MAX_BYTES} bytes, got {path.stat().st_size}.",
                where=path,
                fix=f"Check that this is the right file, or {_restore(path)}",
                code=2,
            )
        return parse(path.read_text(encoding="utf-8"), path)
    except FileNotFoundError:
        raise UserError(
            f"{path.name} does not exist.", where=path.absolute(), fix=capitalize(_restore(path)), code=2
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{path.name} is not UTF-8 text.", where=path, fix="Save it as UTF-8.", code=2) from None


def parse(text: str, path: Path = FILE) -> dict[str, Any]:
    """Parse the text of a YAML mapping. `path` is the location shown in errors. Raises UserError as `read`."""
    return copy.deepcopy(_parse(text, path))


@lru_cache(maxsize=16)
def _parse(text: str, path: Path) -> dict[str, Any]:
    """Parse a text once per process: a command reads the same few files many times, and each takes 0.1 s."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer = _NoAliases
    try:
        data = yaml.load(text)
    except (YAMLError, ValueError, RecursionError) as error:  # ValueError: !!int x; RecursionError: 2,000 brackets
        mark = getattr(error, "problem_mark", None)
        problem = (getattr(error, "problem", None) or str(error)).splitlines()[0]
        raise UserError(
            f"{path.name} is not valid YAML: {problem}.",
            where=f"{path}, line {mark.line + 1}" if mark else path,
            fix="Fix that line." if path == FILE else f"Fix that line, or {_restore(path)}",
            code=2,
        ) from None
    if not isinstance(data, dict):
        raise UserError(
            f"{path.name} must be a YAML mapping, got {shorten(format_value(data))}.",
            where=path,
            fix=capitalize(_restore(path)),
            code=2,
        )
    return data


def _restore(path: Path) -> str:
    if path == FILE:
        return "regenerate the file: vqvae2 config --write"
    return f"restore the file: git checkout {path}"


def to_yaml(data: Mapping[str, Any]) -> str:
    """Format a mapping as YAML in block style, its keys in the given order, without aliases."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _NoAliasRepresenter
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    text = io.StringIO()
    yaml.dump(data, text)
    return text.getvalue()


def write(text: bytes, path: Path = FILE) -> None:
    """Write a file atomically."""
    with artifact.atomic_write(path) as temporary:
        temporary.write_bytes(text)


def check(data: Mapping[str, Any], path: Path | str = FILE) -> Params:
    """Validate keys, types, each section by itself, and the sections against each other.

    `path` is the location shown in errors. Raises UserError if a setting is invalid.
    """
    try:
        # Strict validation of Python objects refuses a mapping for a dataclass; strict validation of JSON accepts it.
        text = json.dumps(data, default=str, ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:  # a list as a key, a number of 5,000 digits, an unpaired surrogate
        raise UserError(
            f"The settings must be valid JSON data: {error}.",
            where=path,
            fix="Use names as keys, and text, numbers and lists as values.",
            code=2,
        ) from None
    try:
        params = adapter(Params).validate_json(text, strict=True)
    except ValidationError as error:
        details = _merge_unions([dict(details) for details in error.errors()])
        raise _to_user_error([_explain(item) for item in details[:MAX_ERRORS]], path) from None
    for problem in conflicts(params):
        raise UserError(problem.headline, where=f"{path}: {problem.key}", fix=problem.fix, code=2)
    # Order priors as the levels, coarse to fine: the order in the file may differ.
    return dataclasses.replace(params, priors={level: params.priors[level] for level in params.vqvae.levels})


def look_up(data: Mapping[str, Any], key: str) -> Any:
    """Return the value of a key such as priors.top; None if it is absent."""
    value: Any = data
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Yield "key old -> new" for each setting that differs between two flat mappings."""
    for key in {**old, **new}:
        if old.get(key) != new.get(key):
            before, after = (
                "(none)" if values.get(key) is None else shorten_middle(format_value(values[key]))
                for values in (old, new)
            )
            yield f"{key} {before} -> {after}"


def _to_user_error(problems: Sequence[Problem], path: Path | str) -> UserError:
    """Combine problems into one error with one headline and one fix per problem."""
    fixes = list(dict.fromkeys(problem.fix for problem in problems))
    if len(fixes) > 1:
        fixes = [
            fix if not key or re.search(rf"(^|\s){re.escape(key)}\b", fix) else f"{key}: {fix[:1].lower()}{fix[1:]}"
            for key, _, fix in problems
        ]
    headline = "\n".join(problem.headline for problem in problems)
    return UserError(headline, where=path, fix="\n       ".join(fixes), code=2)


def _merge_unions(errors: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merge the errors of a setting of several types: pydantic reports one for each type, whose location ends in it."""
    merged: dict[tuple[Any, ...], dict[str, Any]] = {}
    for error in errors:
        location, rule = tuple(error["loc"]), error["msg"].removeprefix("Input should be ")
        setting = location[:-1]
        if PAIR in location:  # with the index of an item, or without
            setting, rule = location[: location.index(PAIR)], "a pair [min, max]"
        elif not (location and re.fullmatch(r"int|literal\[.*\]", str(location[-1]))):
            setting = location
        if setting != location and _key(setting) in _keys(Params, ""):
            error["loc"] = setting
            if previous := merged.get(setting):
                if rule not in previous["msg"]:
                    previous["msg"] += f" or {rule}"
                continue
        merged[tuple(error["loc"])] = error
    return list(merged.values())


def _key(location: Sequence[Any]) -> str:
    return _generalize(".".join(map(str, location)))


def _explain(error: dict[str, Any]) -> Problem:
    """Convert one of pydantic's error details."""
    key = ".".join(str(step) for step in error["loc"])
    value = shorten(format_value(error.get("input")))
    match error["type"]:
        case "unexpected_keyword_argument" | "extra_forbidden":
            near = nearest(key)
            return Problem(key, f"{key} is not a valid setting.", f"Did you mean {near}?" if near else f"Remove {key}.")
        case "missing" | "missing_argument" | "missing_keyword_only_argument":
            return Problem(key, f"{key} is missing.", "Add what is missing. To see the values of conf/: vqvae2 config")
        case "value_error":
            return explain(error["ctx"]["error"], key)
        case "dataclass_type" | "dict_type":
            keys = ", ".join(within(key) or within(f"{key}.{PLACEHOLDERS.get(key.rpartition('.')[2], 'LEVEL')}"))
            return Problem(key, f"{key} must be a mapping of settings, got {value}.", f"Set these instead: {keys}")
    rule, prefix = error["msg"], "Input should be "
    if not rule.startswith(prefix):
        return Problem(key, f"{key} is not valid, got {value}: {rule[:1].lower()}{rule[1:]}.", f"Change {key}.")
    rule = rule.removeprefix(prefix)
    return Problem(key, f"{key} must be {rule}, got {value}.", f"Set {key} to {rule}.")


def within(key: str) -> list[str]:
    """List the full keys of a section's settings."""
    keys = [name.rpartition(".") for name in _keys(Params, "")]
    return [f"{key}.{leaf}".lstrip(".") for parent, _, leaf in keys if parent == _generalize(key)]


def nearest(key: str) -> str:
    """Return the valid key most similar to an unknown one; "" if none is similar."""
    parent, _, leaf = key.rpartition(".")
    for candidates, similarity in (
        (within(parent), SAME_SECTION_SIMILARITY),
        (list(_keys(Params, "")), OTHER_SECTION_SIMILARITY),
    ):
        by_leaf = {name.rpartition(".")[2]: name for name in reversed(candidates)}
        if close := difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=similarity):
            return by_leaf[close[0]]
    return ""


def _generalize(key: str) -> str:
    """Replace keys that users choose, such as the names of levels, by their placeholders."""
    steps = key.split(".")
    for index in range(1, len(steps)):
        if steps[index - 1] in PLACEHOLDERS:
            steps[index] = PLACEHOLDERS[steps[index - 1]]
    return ".".join(steps)


def _keys(kind: Any, prefix: str) -> Iterator[str]:
    for name, hint in get_type_hints(kind).items():
        if hint is ComposedFrom:
            continue  # written by Hydra only
        key = f"{prefix}{name}"
        yield key
        if dataclasses.is_dataclass(hint):
            yield from _keys(hint, f"{key}.")
        elif get_origin(hint) is not None:
            for argument in filter(dataclasses.is_dataclass, get_args(hint)):
                yield from _keys(argument, f"{key}.{PLACEHOLDERS[name]}.")
