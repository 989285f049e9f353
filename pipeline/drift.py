"""Differences between params.yaml and what conf/ composes to, reported as notes on the terminal."""

import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline import params
from pipeline.compose import compose_params
from pipeline.params_header import CONF, read_overrides
from pipeline.text import first_few
from stages.errors import UserError
from stages.formats.flatten import flatten


def drift() -> tuple[str, str]:
    """Compare params.yaml with what conf/ composes to; return the difference and its fix, or two empty strings.

    conf/ is composed only if one of its files is newer than params.yaml, because composing is slow.
    """
    files = [CONF, *CONF.rglob("*")] if CONF.is_dir() else []
    if max(map(_modification_time_ns, files), default=0) <= params.FILE.stat().st_mtime_ns:
        return "", ""
    overrides = read_overrides()
    try:
        composed = compose_params(overrides)
    except UserError as error:
        reason = error.what.rstrip(".")
        return f"conf/ has changed since {params.FILE} was composed and is not valid now: {reason}", error.fix
    differences = list(params.changes(flatten(params.read()), flatten(composed)))
    if not differences:
        return "", ""
    command = shlex.join(["vqvae2", "config", *overrides, "--write"])
    return f"{params.FILE} differs from what conf/ composes to: {first_few(differences)}", f"Regenerate it: {command}"


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
    """Print the settings of params.yaml that return to conf/ when `composed` replaces it."""
    if reverted := list(_reverted(overrides, composed)):
        print(f"note: back to conf/: {first_few(reverted)}", file=sys.stderr)


def _reverted(overrides: Sequence[str], composed: Mapping[str, Any]) -> Iterator[str]:
    """Yield earlier overrides that are not repeated now, and settings that were edited in params.yaml itself."""
    with suppress(UserError):  # an unreadable params.yaml, or a choice that conf/ no longer has: nothing to compare
        old, new = flatten(params.read()), flatten(composed)
        if old == new:
            return
        keys = {_key(override) for override in overrides}
        earlier = {_key(override): override for override in read_overrides()}
        for key, override in earlier.items():
            if key in old and key not in keys:
                yield from params.changes({key: old[key]}, {key: new.get(key)})
            elif key not in keys:  # a choice of a group, which stands for many settings
                yield override
        before_edits = flatten(compose_params(read_overrides()))
        edited = [key for key in old if old[key] != before_edits.get(key) and key not in keys | earlier.keys()]
        yield from params.changes({key: old[key] for key in edited}, {key: new.get(key) for key in edited})


def _key(override: str) -> str:
    return re.sub(r"^[+~]+", "", override).partition("=")[0]
