"""Validation of plain data against settings dataclasses. Only this file knows pydantic; the dataclasses do not."""

import dataclasses
from collections.abc import Iterator
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter


@cache
def adapter(kind: type) -> TypeAdapter[Any]:
    """Build a validator for a dataclass and its nested dataclasses: checks types, and rejects unknown keys."""
    for dataclass in _dataclasses(kind):
        dataclass.__pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    return TypeAdapter(kind)


def _dataclasses(kind: Any) -> Iterator[Any]:
    if dataclasses.is_dataclass(kind):
        yield kind
        for hint in get_type_hints(kind).values():
            yield from _dataclasses(hint)
    elif get_origin(kind) is not None:
        for argument in get_args(kind):
            yield from _dataclasses(argument)
