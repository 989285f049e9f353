"""Section `composed_from` of params.yaml: the choices and overrides that conf/ was composed with.

No stage depends on it. Hydra fills it in, for vqvae2 and for `dvc exp run` alike (pipeline/compose.py), so the next
command can repeat the composition. A digest of the settings shows whether the file was edited since.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline import params
from stages.errors import UserError
from stages.formats.flatten import flatten

CONF = Path("conf")
SECTION = "composed_from"
PLAIN_TEXT = re.compile(r"[A-Za-z_/][A-Za-z0-9_./-]*")  # a value that Hydra reads as text without quotes
RESERVED_WORDS = ("true", "false", "null", "inf", "nan")


def section(choices: Mapping[str, Any], overrides: Sequence[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the contents of the section for composed settings."""
    return {"choices": dict(choices), "overrides": list(overrides), "digest": _digest(settings)}


def overrides_of(data: Mapping[str, Any]) -> list[str]:
    """Return the overrides that contents of params.yaml were composed with; none if they have no such section."""
    overrides = params.look_up(data, f"{SECTION}.overrides")
    return [str(override) for override in overrides] if isinstance(overrides, list) else []


def choices_of(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the choices of groups that contents of params.yaml were composed with."""
    choices = params.look_up(data, f"{SECTION}.choices")
    return dict(choices) if isinstance(choices, Mapping) else {}


def read_overrides() -> list[str]:
    """Read the overrides that params.yaml was composed with; none if it cannot be read."""
    with suppress(UserError):
        return overrides_of(params.read())
    return []


def is_edited(data: Mapping[str, Any]) -> bool:
    """Return whether contents of params.yaml are other settings than were composed, or of unknown origin."""
    return params.look_up(data, f"{SECTION}.digest") != _digest(data)


def settings_of(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return flat settings without the section."""
    return flatten({key: value for key, value in data.items() if key != SECTION})


def key_of(override: str) -> str:
    """Return the setting or the group that an override names."""
    return re.sub(r"^[+~]+", "", override).partition("=")[0]


def format_override(key: str, value: Any) -> str:
    """Format an override that Hydra reads as this value."""
    return f"{key}={_format_value(value)}"


def escape_interpolations(text: str) -> str:
    """Escape ${, which OmegaConf would replace by the value of a setting, and the backslashes before it."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def _format_value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_format_value, value))}]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if not isinstance(value, str):
        return json.dumps(value)
    if PLAIN_TEXT.fullmatch(value) and value.lower() not in RESERVED_WORDS:
        return value
    # Hydra reads a backslash as such, except before a quote and at the end.
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', escape_interpolations(value))
    return '"' + re.sub(r"(\\+)$", r"\1\1", escaped) + '"'


def describe_source(overrides: Sequence[str], conf: Path = CONF) -> str:
    """Describe what settings are composed from, for the location in an error."""
    return f"{conf}/, with {' '.join(overrides)}" if overrides else f"{conf}/"


def _digest(data: Mapping[str, Any]) -> str:
    text = json.dumps(settings_of(data), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
