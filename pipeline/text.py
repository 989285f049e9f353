"""Formatting of values and lists in messages."""

import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from stages.tracking.journal import redact_secrets

MAX_CHARACTERS = 60  # of a value in a message
NAME_WIDTH = 13  # characters of the longest usual stage name, prior_bottom, and one more
MIN_WIDTH = 40  # characters of a line, in a narrower terminal too


def first_few(items: Sequence[str], count: int = 3, separator: str = ", ") -> str:
    """Join the first items and append the number of the others."""
    omitted = len(items) - count
    return separator.join(items[:count]) + (f" and {omitted} more" if omitted > 0 else "")


def format_value(value: Any) -> str:
    """Format a setting's value as JSON, as in `"many"`, `null` or `[0.1]`, without the credentials of URLs."""
    return json.dumps(redact_secrets(value), ensure_ascii=False, default=str)


def shorten(text: str, length: int = MAX_CHARACTERS) -> str:
    """Cut a text to a number of characters."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def shorten_middle(text: str, length: int = MAX_CHARACTERS) -> str:
    """Cut characters out of the middle of a text, such as a path, of which beginning and end matter."""
    half = (length - 3) // 2
    return text if len(text) <= length else f"{text[:half]}...{text[-half:]}"


def format_row(name: str, text: str) -> str:
    """Format a line about a stage. On a terminal, further lines are indented below the text."""
    first = f"{name:<{NAME_WIDTH}} "
    return wrap(f"{first}{text}".rstrip(), " " * len(first))


def wrap(text: str, indent: str = "") -> str:
    """Wrap a line to the width of the terminal, with an indent of further lines. Other output is not wrapped."""
    if not sys.stdout.isatty():
        return text
    width = max(MIN_WIDTH, shutil.get_terminal_size().columns)
    return textwrap.fill(text, width, subsequent_indent=indent, break_on_hyphens=False, replace_whitespace=False)


def capitalize(text: str) -> str:
    """Capitalize the first letter and keep the others."""
    return f"{text[:1].upper()}{text[1:]}"
