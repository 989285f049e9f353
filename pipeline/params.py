"""Reader and validator of params.yaml. All settings are validated before anything runs.

The dataclasses of models/config.py and stages/config.py declare the settings. An error names the full key, the rule and
the value, and suggests the nearest valid key for an unknown one.
"""

import dataclasses
import difflib
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer, ComposerError
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import AliasEvent
from ruamel.yaml.nodes import Node
from ruamel.yaml.representer import SafeRepresenter

from pipeline.text import capitalize, format_value, shorten, shorten_middle
from stages.config import ComposedFrom, Params
from stages.errors import UserError, install_command
from stages.formats import artifact
from stages.formats.config_schema import adapter

FILE = Path("params.yaml")
MAX_BYTES = 1_000_000  # far more than any params.yaml, dvc.yaml or dvc.lock has
MAX_ERRORS = 5  # in one message
# DVC takes a path that begins with one of its schemes for a URL, also without slashes.
URL = re.compile(r"([a-z][\w+.-]*)://|(https?|s3|gs|azure|ssh|hdfs|webhdfs|webdavs?|oss|gdrive|remote):", re.IGNORECASE)
NAMED_BY_USERS = ("evaluate.networks",)  # mappings whose keys are names of the user's choice
SAME_SECTION_SIMILARITY = 0.6  # difflib's ratio for a suggestion from the section of the unknown key
OTHER_SECTION_SIMILARITY = 0.8  # for one from any section: only a typing error counts


# Mapping whose keys users choose -> what stands for a key in the names of settings.
PLACEHOLDERS = {
    "levels": "LEVEL",
    "priors": "LEVEL",
    "level_rules": "LEVEL",
    "classifiers": "ARTIFACT",
    "rejections": "ARTIFACT",
}
# Artifacts with images that a classifier can be trained on, and that a rejection can select from.
CLASSIFIED = ("shards", "vqvae", "samples", "accepted")
REJECTED = ("samples",)


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


class Problem(NamedTuple):
    """One invalid setting."""

    key: str  # full key, such as "cluster.workers"; "" for the settings as a whole
    headline: str  # the violated rule and the value
    fix: str


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
        raise _to_user_error([_explain(dict(details)) for details in error.errors()[:MAX_ERRORS]], path) from None
    for problem in _conflicts(params):
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


def explain(error: ValueError, section: str = "") -> Problem:
    """Convert the ValueError of a settings class, "{field} must be {rule}, got {value}[; {fix}]".

    `section` becomes the prefix of the field. Without a fix the rule becomes one: "Set cluster.workers to 1 or more."
    """
    sentence, _, fix = str(error).partition("; ")
    match = re.match(r"([\w.]+) must be (.+), got ", sentence)
    fix = f"{capitalize(fix)}." if fix else ""
    if not match:
        return Problem(section, f"{capitalize(sentence)}.", fix or "Choose values that are valid together.")
    key = f"{section}.{match[1]}".lstrip(".")
    rule = f"a value {match[2]}" if match[2].startswith(("above ", "below ", "at ")) else match[2]
    return Problem(key, f"{key}{sentence[match.end(1) :]}.", fix or f"Set {key} to {rule}.")


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


def _conflicts(params: Params) -> Iterator[Problem]:
    """Yield settings that are valid alone and contradict another section."""
    levels, priors = params.vqvae.levels, params.priors
    yield from _not_local("dataset.source", params.dataset.source)
    try:
        params.vqvae.grids(params.dataset.image_size)
    except ValueError as error:
        yield explain(error, "dataset")
    headline = f"priors must have the levels of vqvae.levels ({', '.join(levels)}), got {', '.join(priors) or 'none'}."
    for level in levels:
        if level not in priors:
            yield Problem("priors", headline, f"Add the prior of {level}: -S '+prior@priors.{level}=pixelcnn'")
    for level in priors:
        if level not in levels:
            yield Problem(
                f"priors.{level}",
                headline,
                f"Add {level} to vqvae.levels, or remove its prior: -S '~prior@priors.{level}'",
            )
    entries = max(level.entries for level in levels.values())
    if params.sample.top_k > entries:
        yield top_k_problem("sample.top_k", params.sample.top_k, entries)
    yield from _sampling_conflicts(params)
    yield from _indivisible("train_vqvae.batch_size", params.train_vqvae.batch_size, params.cluster.workers)
    for level, prior in priors.items():
        yield from _indivisible(f"priors.{level}.train.batch_size", prior.train.batch_size, params.cluster.workers)
    yield from _classifier_conflicts(params)


def _sampling_conflicts(params: Params) -> Iterator[Problem]:
    """Yield problems of the sampling rules of levels."""
    levels = params.vqvae.levels
    for level, own in params.sample.level_rules.items():
        key = f"sample.level_rules.{level}"
        if level not in levels:
            headline = f"sample.level_rules must name levels of vqvae.levels ({', '.join(levels)}), got {level}."
            yield Problem(key, headline, f"Remove {key}, or use one of these names.")
        elif own.top_k and own.top_k > levels[level].entries:
            yield top_k_problem(f"{key}.top_k", own.top_k, levels[level].entries)
    for level, prior in params.priors.items():
        guidance = params.sample.rule(level)["guidance"]
        if guidance != 1 and not prior.network.label_dropout:
            yield Problem(
                f"priors.{level}.network.label_dropout",
                f"priors.{level}.network.label_dropout must be above 0 for a guidance of {guidance:g}, got 0.",
                f"Add: -S priors.{level}.network.label_dropout=0.1. Or set sample.guidance to 1.",
            )


def _classifier_conflicts(params: Params) -> Iterator[Problem]:
    """Yield problems of classifiers and rejections, which name the artifacts that they read."""
    for section, names in (("classifiers", CLASSIFIED), ("rejections", REJECTED)):
        for name in getattr(params, section):
            if name not in names:
                headline = f"{section} must be named after artifacts with images ({', '.join(names)}), got {name}."
                yield Problem(f"{section}.{name}", headline, f"Remove {section}.{name}, or use one of these names.")
    if params.rejections and "shards" not in params.classifiers:
        yield Problem(
            "rejections",
            "rejections need a critic, the classifier of real images, got none.",
            "Add it: -S +classifier@classifiers.shards=small",
        )
    if "accepted" in params.classifiers and not params.rejections:
        yield Problem(
            "classifiers.accepted",
            "classifiers.accepted needs accepted samples, got no rejection.",
            "Add it: -S +rejection@rejections.samples=half",
        )
    for name, classifier in params.classifiers.items():
        key = f"classifiers.{name}"
        yield from _indivisible(f"{key}.train.batch_size", classifier.train.batch_size, params.cluster.workers)
        if classifier.network.stride > params.dataset.image_size:
            yield Problem(
                f"{key}.network.halvings",
                f"{key}.network must have a stride of at most dataset.image_size, which is "
                f"{params.dataset.image_size}, got {classifier.network.stride}.",
                f"Lower {key}.network.halvings or {key}.network.stem_stride.",
            )


def _not_local(key: str, path: str) -> Iterator[Problem]:
    """Describe a path that DVC would not read on this machine: a URL, or ~, which only a shell replaces."""
    if match := URL.match(path):
        local = f"data/{PurePosixPath(urlsplit(path).path).name or 'images'}"
        fix = f"Download it and track it: dvc import-url {path} {local}. Then set {key} to {local}."
        if (match[1] or match[2]).lower() == "s3":
            fix += f" S3 needs: {install_command('s3')}"
        yield Problem(key, f"{key} must be a path on this machine, got the URL {path}.", fix)
    elif re.match("~[^/]*(/|$)", path):
        expanded = os.path.expanduser(path)  # noqa: PTH111  # Path raises an error for an unknown user
        fix = f"Set {key} to {expanded}." if expanded != path else f"For a folder of this name: ./{path}"
        yield Problem(key, f"{key} must be a path without ~, got {path}.", fix)


def top_k_problem(key: str, top_k: int, entries: int) -> Problem:
    """Describe a top-k above the number of entries of the largest codebook."""
    headline = f"{key} must be at most {entries}, the entries of the largest codebook, got {top_k}."
    return Problem(key, headline, f"Set {key} to 1 to {entries}, or to 0 to keep all entries.")


def _indivisible(key: str, batch_size: int, workers: int) -> Iterator[Problem]:
    if batch_size % workers:
        below = batch_size // workers * workers
        yield Problem(
            key,
            f"{key} must be a multiple of cluster.workers, which is {workers}, got {batch_size}.",
            f"Set {key} to {f'{below} or ' if below else ''}{below + workers}, or change cluster.workers.",
        )
