"""Flattening of nested settings and metrics."""

from dataclasses import dataclass

from stages.formats.flatten import flatten, flatten_numbers


@dataclass(frozen=True)
class Settings:
    steps: int
    names: tuple[str, ...]


def test_nested_keys_are_joined_by_dots():
    """Mappings and dataclasses are flattened; lists and empty mappings are values."""
    settings = {"a": {"b": {"c": 1}}, "d": [], "e": {}, "train": Settings(3, ("x",))}
    assert flatten(settings) == {"a.b.c": 1, "d": [], "e": {}, "train.steps": 3, "train.names": ("x",)}


def test_prefix_is_the_key_of_the_value():
    """A prefix precedes each key; a value that is not a mapping gets the prefix itself as its key."""
    assert flatten({"steps": 3}, "train") == {"train.steps": 3}
    assert flatten(None, "train") == {"train": None}


def test_flatten_numbers_drops_text_lists_and_bools():
    """Numbers become floats; other values are dropped."""
    metrics = {"images": 8, "kid": {"value": 0.5, "network": "n"}, "empty": {}, "list": [1], "collapsed": True}
    assert flatten_numbers(metrics) == {"images": 8.0, "kid.value": 0.5}
