"""Where params.yaml comes from: conf/, and the overrides that its header keeps.

Comments are nothing to DVC, which watches the values. Who rewrites the file by other means leaves the header out.
"""

import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline import params
from stages.errors import UserError

CONF = Path("conf")
OVERRIDES = "# Overrides: "  # the line of the header, if there were any


def describe_source(overrides: Sequence[str], conf: Path = CONF) -> str:
    """Name what settings are composed from, where a mistake in them is to be looked for."""
    return f"{conf}/, with {' '.join(overrides)}" if overrides else f"{conf}/"


def kept() -> list[str]:
    """List the overrides that params.yaml was composed with, as its header has them."""
    found: list[str] = []
    with suppress(OSError, ValueError), params.FILE.open(encoding="utf-8") as file:
        for line in file:
            if not line.startswith("#"):
                break
            if line.startswith(OVERRIDES):
                found = shlex.split(line.removeprefix(OVERRIDES))
    return found


def drift() -> tuple[str, str]:
    """Say how params.yaml differs from what conf/ composes to since it was edited, and the remedy; "" for neither."""
    files = [CONF, *CONF.rglob("*")] if CONF.is_dir() else []
    if max(map(_edited, files), default=0) <= params.FILE.stat().st_mtime_ns:
        return "", ""  # as nearly always, and Hydra takes its time
    from pipeline.compose import compose_params

    overrides = kept()
    try:
        composed = compose_params(overrides)
    except UserError as error:
        what = error.what.rstrip(".")
        return f"conf/ has changed since {params.FILE} was composed, and cannot be composed now: {what}", error.fix
    found = list(params.changes(params.flat(params.read()), params.flat(composed)))
    if not found:
        return "", ""
    anew = shlex.join(["vqvae2", "config", *overrides, "--write"])
    return f"{params.FILE} is not what conf/ composes to by now: {first_few(found)}", f"Take it over: {anew}"


def _edited(path: Path) -> int:
    with suppress(OSError):  # an editor's lock is a link to nothing, and its copies come and go
        return path.stat().st_mtime_ns
    return 0


def warn_drift() -> None:
    """Say it on the screen, with what to do."""
    text, remedy = drift()
    if text:
        print(f"note: {text}. {remedy}", file=sys.stderr)


def warn_reverted_overrides(overrides: Sequence[str], composed: Mapping[str, Any]) -> None:
    """Say on the screen which settings of params.yaml go back to conf/ when `composed` takes its place."""
    if found := list(_lost(overrides, composed)):
        print(f"note: back to conf/: {first_few(found)}", file=sys.stderr)


def _lost(overrides: Sequence[str], composed: Mapping[str, Any]) -> Iterator[str]:
    """Name what earlier overrides said that are not given again, and what was edited in the file itself."""
    from pipeline.compose import compose_params

    with suppress(UserError):  # neither a file that cannot be read nor a choice that is gone can be compared
        old, new = params.flat(params.read()), params.flat(composed)
        if old == new:
            return
        given, earlier = {_key(one) for one in overrides}, {_key(one): one for one in kept()}
        for key, override in earlier.items():
            if key in old and key not in given:
                yield from params.changes({key: old[key]}, {key: new.get(key)})
            elif key not in given:  # a choice of many settings
                yield override
        was = params.flat(compose_params(kept()))
        edited = [key for key in old if old[key] != was.get(key) and key not in given | earlier.keys()]
        yield from params.changes({key: old[key] for key in edited}, {key: new.get(key) for key in edited})


def _key(override: str) -> str:
    return re.sub(r"^[+~]+", "", override).partition("=")[0]


def first_few(found: Sequence[str], shown: int = 3) -> str:
    """List the first, and say how many more there are."""
    more = len(found) - shown
    return ", ".join(found[:shown]) + (f" and {more} more" if more > 0 else "")
