"""Sampling options: keyword arguments that all methods of the Python API that draw codes share."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypedDict

from stages.config import LevelRule, SampleConfig


class SamplingOptions(TypedDict, total=False):
    """Sampling rule of a draw. A method's own default applies where an option is missing or None."""

    temperature: float | None  # divides the logits, above 0; below 1, samples vary less
    top_k: int | None  # draw from the k likeliest entries, 0 or more; 0 keeps all
    top_p: float | None  # draw from the likeliest entries with this total probability, above 0 and at most 1
    guidance: float | None  # scale of classifier-free guidance, 0 or more; 1 is none
    # rules of single levels, such as {"bottom": {"top_k": 20}}, added to those of the method's default; {} removes them
    level_rules: Mapping[str, Mapping[str, float]] | None


def merge_options(options: Mapping[str, Any], defaults: SampleConfig) -> SampleConfig:
    """Return `defaults` with the SamplingOptions that are given, for the Python API and the command line alike.

    An option of all levels overrides the defaults of single levels. `level_rules` are added to those of the defaults
    and override all else; an empty mapping removes those of the defaults. Raises TypeError for an unknown option and
    ValueError for a value out of range.
    """
    valid_names = SamplingOptions.__annotations__
    if unknown := [name for name in options if name not in valid_names]:
        raise TypeError(f"sampling options must be any of {', '.join(valid_names)}, got {unknown[0]}")
    changes: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    given_rules = changes.pop("level_rules", None)
    rules: dict[str, dict[str, Any]] = {}
    if given_rules is None or given_rules:
        for level, stored_rule in defaults.level_rules.items():
            rules[level] = {name: value for name, value in vars(stored_rule).items() if name not in changes}
    for level, rule in (given_rules or {}).items():
        rules[level] = {**rules.get(level, {}), **rule}
    level_rules = {level: LevelRule(**rule) for level, rule in rules.items()}
    return dataclasses.replace(defaults, **changes, level_rules=level_rules)


def apply_options(options: SamplingOptions, defaults: SampleConfig, *, entries: Mapping[str, int]) -> SampleConfig:
    """Return the settings of a draw: `merge_options` for models whose codebooks have `entries`, by level.

    Raises errors as `merge_options`, and ValueError if top_k exceeds the largest codebook, or that of its level.
    """
    config, largest = merge_options(options, defaults), max(entries.values())
    if config.top_k > largest:
        raise ValueError(f"top_k must be at most {largest}, the entries of the largest codebook, got {config.top_k}")
    for level, rule in config.level_rules.items():
        limit = entries.get(level)  # without one, another error names the level
        if limit is not None and (rule.top_k or 0) > limit:
            raise ValueError(f"top_k of {level} must be at most {limit}, the entries of its codebook, got {rule.top_k}")
    return config
