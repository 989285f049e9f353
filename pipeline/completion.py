"""Shell completion of stages, settings, classes and runs, read from files of the project.

It answers while the user waits for the Tab key, so this module imports no slow library, and it is silent on errors.
"""

import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from itertools import chain
from pathlib import Path
from typing import Any

COMPLETE_VARIABLE = "_VQVAE2_COMPLETE"  # environment variable by which a shell asks for completions
# Environment variable: the beginning of the unfinished word, which the shell keeps instead of replacing it.
KEPT_VARIABLE = "_VQVAE2_COMPLETE_KEPT"
WORD_BREAKS = "=@:"  # characters at which bash splits words, also inside of experiment=smoke
PLAIN_VALUE = re.compile(r"[\w.+-]+")  # needs no quotes in a shell
GIT_TIMEOUT_S = 2.0


def complete(kind: str, incomplete: str, options: Any = None) -> list[str]:
    """Return the completions of an unfinished word; none if a file cannot be read. `options` are those given so far."""
    try:
        candidates = dict.fromkeys(SOURCES[kind](dict(options or {})))  # in order, each once
    except Exception:  # a message would appear in the middle of the command line
        return []
    kept_part = os.environ.get(KEPT_VARIABLE, "")
    word = kept_part + incomplete
    sign = word[:1] if kind == "setting" and word[:1] in ("+", "~") else ""
    signed = (f"{sign}{candidate}" for candidate in candidates)
    return [_quote(candidate.removeprefix(kept_part)) for candidate in signed if candidate.startswith(word)]


def stages(options: Any) -> Iterator[str]:
    """Yield the stages of dvc.yaml by their names in commands."""
    pipeline = _read_yaml(Path("dvc.yaml"))["stages"]
    for name, entry in pipeline.items():
        if name == "result_versions":
            continue
        if "foreach" in entry:
            section = entry["foreach"].strip("${}")
            yield from (f"{name}_{key}" for key in _read_yaml(Path("params.yaml"))[section])
        else:
            yield name


def settings(options: Any) -> Iterator[str]:
    """Yield GROUP=CHOICE for each file in conf/, presets first, and KEY=VALUE for each setting in params.yaml."""
    from pipeline import conf_layers

    conf = Path("conf")
    groups = dict.fromkeys(
        group for path in conf_layers.primary_files(conf) for group in conf_layers.choices_of(_read_yaml(path))
    )
    for group in sorted(groups, key=lambda group: group != "experiment"):
        for choice in conf_layers.choices(conf, group.partition("@")[0]):
            yield f"{group}={choice}"
    values = _read_yaml(Path("params.yaml"))
    values.pop("composed_from", None)  # a record, not a setting
    yield from _flatten(values, "")


def presets(options: Any) -> Iterator[str]:
    """Yield the presets of the package."""
    from pipeline import conf_layers

    yield from conf_layers.choices(conf_layers.PACKAGED, "experiment")


def classes(options: Any) -> Iterator[str]:
    """Yield the classes that the model was trained on."""
    manifest = Path(options.get("model") or "artifacts", "vqvae", "manifest.json")
    yield from json.loads(manifest.read_text(encoding="utf-8"))["meta"]["classes"]


def runs(options: Any) -> Iterator[str]:
    """Yield what `compare` accepts: DVC experiments, Git tags and branches, and runs of the pipeline, newest first."""
    git = ["git", "for-each-ref", "--sort=-creatordate", "--format=%(refname)"]
    command = [*git, "refs/exps", "refs/tags", "refs/heads"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=False)
    for ref in result.stdout.splitlines():
        kind, name = ref.split("/", 2)[1:]
        if kind != "exps":
            yield name
        elif name.count("/") == 2 and not name.startswith("exec/"):  # two parts of the baseline's hash, and the name
            yield name.rpartition("/")[2]
    yield from sorted((path.parent.name for path in Path("runs/pipeline").glob("*/journal.jsonl")), reverse=True)


SOURCES: dict[str, Callable[[Any], Iterable[str]]] = {
    "stage": stages,
    "setting": settings,
    "preset": presets,
    "class": classes,
    "run": runs,
}


def join_bash_words(environment: MutableMapping[str, str]) -> None:
    """Join the words that bash has split at WORD_BREAKS, in the variables of its request.

    Bash replaces only the last part of the unfinished word: of "experiment=sm", KEPT_VARIABLE gets "experiment=", and
    "sm" is left as the unfinished word.
    """
    index = int(environment.get("COMP_CWORD", "0"))
    joined: list[str] = []
    kept_part = unfinished = ""
    is_open = False  # the next word continues the last one
    for word in [*environment.get("COMP_WORDS", "").split(), ""][: index + 1]:
        is_break = bool(word) and set(word) <= set(WORD_BREAKS)
        if joined and (is_break or is_open):
            kept_part, unfinished = joined[-1] + (word if is_break else ""), "" if is_break else word
            joined[-1] += word
        else:
            kept_part, unfinished = "", word
            joined.append(word)
        is_open = is_break
    environment["COMP_WORDS"] = " ".join([*joined[:-1], unfinished])
    environment["COMP_CWORD"] = str(len(joined) - 1)
    environment[KEPT_VARIABLE] = kept_part


def _flatten(value: Any, key: str) -> Iterator[str]:
    if isinstance(value, dict) and value:
        yield from chain.from_iterable(_flatten(item, f"{key}.{name}".lstrip(".")) for name, item in value.items())
    else:
        text = str(value).lower() if isinstance(value, bool) else str(value)
        yield f"{key}={text if PLAIN_VALUE.fullmatch(text) else ''}"


def _quote(word: str) -> str:
    return shlex.quote(word) if os.environ.get(COMPLETE_VARIABLE) == "complete_bash" and " " in word else word


def _read_yaml(path: Path) -> Any:
    import yaml

    return yaml.load(path.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
