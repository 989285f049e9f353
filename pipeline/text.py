"""Formatting of values and lists in messages."""

import json
from collections.abc import Sequence
from typing import Any

MAX_CHARACTERS = 60  # of a value in a message


def first_few(items: Sequence[str], count: int = 3) -> str:
    """Join the first items with commas and append the number of the others."""
    omitted = len(items) - count
    return ", ".join(items[:count]) + (f" and {omitted} more" if omitted > 0 else "")


def format_value(value: Any) -> str:
    """Format a setting's value as JSON, as in `"many"`, `null` or `[0.1]`."""
    return json.dumps(value, ensure_ascii=False, default=str)


def shorten(text: str) -> str:
    """Cut a text to 60 characters."""
    return text if len(text) <= MAX_CHARACTERS else f"{text[: MAX_CHARACTERS - 3]}..."


def capitalize(text: str) -> str:
    """Capitalize the first letter and keep the others."""
    return f"{text[:1].upper()}{text[1:]}"
