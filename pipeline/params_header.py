"""Header of params.yaml: a comment with the overrides that conf/ was composed with.

DVC compares values only, so the header changes no stage. `dvc exp run -S` rewrites params.yaml without a header.
"""

import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pipeline import params

CONF = Path("conf")
_NOTICE = "# Composed from conf/ by `vqvae2 config --write`. Edit conf/ instead, or override: vqvae2 run -S seed=1\n"
_OVERRIDES = "# Overrides: "  # start of the second line; absent without overrides


def format_header(overrides: Sequence[str]) -> str:
    """Format the header of a params.yaml composed with overrides."""
    return _NOTICE + (f"{_OVERRIDES}{shlex.join(overrides)}\n" if overrides else "")


def read_overrides() -> list[str]:
    """Read the overrides that params.yaml was composed with; empty if it has no header or cannot be read."""
    overrides: list[str] = []
    with suppress(OSError, ValueError), params.FILE.open(encoding="utf-8") as file:
        for line in file:
            if not line.startswith("#"):
                break
            if line.startswith(_OVERRIDES):
                overrides = shlex.split(line.removeprefix(_OVERRIDES))
    return overrides


def describe_source(overrides: Sequence[str], conf: Path = CONF) -> str:
    """Describe what settings are composed from, for the location in an error."""
    return f"{conf}/, with {' '.join(overrides)}" if overrides else f"{conf}/"
