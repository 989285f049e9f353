"""Flattening of nested mappings to full keys joined by dots, such as "vqvae.levels.top.stride"."""

import dataclasses
from collections.abc import Mapping
from typing import Any


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings and dataclasses: {"a": {"b": 1}} becomes {"a.b": 1}.

    Lists and empty mappings are values. `prefix` is the key of `value` itself.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    values: dict[str, Any] = {}
    for key, nested in value.items():
        values |= flatten(nested, f"{prefix}.{key}" if prefix else str(key))
    return values


def flatten_numbers(value: Any) -> dict[str, float]:
    """Flatten nested mappings and keep the numbers only; a bool is not a number."""
    return {
        key: float(number)
        for key, number in flatten(value).items()
        if isinstance(number, int | float) and not isinstance(number, bool)
    }
