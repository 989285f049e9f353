"""Differences between params.yaml and what conf/ composes to, reported as notes on the terminal."""

import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline import conf_layers, params
from pipeline.compose import compose_params
from pipeline.composed_from import CONF, format_override, is_edited, key_of, overrides_of, settings_of
from pipeline.text import first_few
from stages.errors import UserError


def drift() -> tuple[str, str]:
    """Compare params.yaml with what conf/ composes to; return the difference and its fix, or two empty strings.

    Edits of params.yaml are not a difference. conf/ is composed only if one of its files is newer than params.yaml,
    because composing is slow. Raises UserError if params.yaml is missing or not valid YAML.
    """
    data = params.read()
    files = [path for layer in conf_layers.layers(CONF) if layer.is_dir() for path in (layer, *layer.rglob("*"))]
    if max(map(_modification_time_ns, files), default=0) <= params.FILE.stat().st_mtime_ns:
        return "", ""
    if is_edited(data):
        return "", ""
    overrides = overrides_of(data)
    try:
        composed = compose_params(overrides)
    except UserError as error:
        reason = error.what.rstrip(".")
        return f"conf/ has changed since {params.FILE} was composed and is not valid now: {reason}", error.fix
    differences = list(params.changes(settings_of(data), settings_of(composed)))
    if not differences:
        return "", ""
    return (
        f"{params.FILE} differs from what conf/ composes to: {first_few(differences)}",
        f"Regenerate it: {_config_command(overrides)}",
    )


def repeating_overrides(data: Mapping[str, Any]) -> list[str]:
    """Return the overrides that compose conf/ to contents of params.yaml, with edits of the file.

    Raises UserError if conf/ does not compose with the recorded overrides.
    """
    overrides = overrides_of(data)
    if not is_edited(data):
        return overrides
    values, composed = settings_of(data), settings_of(compose_params(overrides))
    edits = {
        key: format_override(key if key in composed else f"+{key}", value)
        for key, value in values.items()
        if (key not in composed or composed[key] != value) and value != {}
    }
    unedited = [override for override in overrides if key_of(override) not in edits]
    if not (removed := list(_removed_entries(composed, values))):
        return [*unedited, *edits.values()]
    below = tuple(f"{entry}." for entry in removed)
    unedited = [override for override in unedited if not key_of(override).startswith(below)]
    present = compose_params(unedited)  # a dropped override may have added the entry
    deletions = [f"~{entry}" for entry in removed if params.look_up(present, entry) is not None]
    return [*unedited, *edits.values(), *deletions]


def _removed_entries(composed: Iterable[str], values: Iterable[str]) -> Iterator[str]:
    """Yield the entries of mappings, such as priors.top, that settings composed from conf/ have and values lack.

    Any other setting that a file lacks has its default.
    """
    entries = {entry for key in values if (entry := _entry_of(key))}
    yield from dict.fromkeys(entry for key in composed if (entry := _entry_of(key)) and entry not in entries)


def _entry_of(key: str) -> str:
    """Return the part of a key that names an entry of a mapping whose keys users choose; "" without one."""
    names = key.split(".")
    for end, name in enumerate(names[:-1], start=1):
        if name in params.PLACEHOLDERS or ".".join(names[:end]) in params.NAMED_BY_USERS:
            return ".".join(names[: end + 1])
    return ""


def _config_command(overrides: Sequence[str]) -> str:
    return shlex.join(["vqvae2", "config", *overrides, "--write"])


def _modification_time_ns(path: Path) -> int:
    with suppress(OSError):  # an editor's lock file is a dangling link, and backup copies disappear
        return path.stat().st_mtime_ns
    return 0


def warn_drift() -> None:
    """Print the difference between params.yaml and conf/, and its fix."""
    difference, fix = drift()
    if difference:
        print(f"note: {difference}. {fix}", file=sys.stderr)


def warn_reverted_overrides(overrides: Sequence[str], composed: Mapping[str, Any]) -> None:
    """Print the settings of params.yaml that return to conf/ when `composed` replaces it, and how to keep them."""
    with suppress(UserError):  # an unreadable params.yaml, or a choice that conf/ no longer has: nothing to compare
        former = params.read()
        old, new = settings_of(former), settings_of(composed)
        repeated = {key_of(override) for override in overrides}
        dropped = [override for override in repeating_overrides(former) if key_of(override) not in repeated]
        if old != new and dropped:
            reverted = [text for override in dropped for text in _describe_reverted(override, old, new)]
            options = shlex.join([argument for override in dropped for argument in ("-S", override)])
            print(f"note: back to conf/: {first_few(reverted)}. To keep them, repeat: {options}", file=sys.stderr)


def _describe_reverted(override: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    key = key_of(override)
    if key in old:
        yield from params.changes({key: old[key]}, {key: new.get(key)})
    else:  # a choice of a group, which stands for many settings
        yield override
