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
    level_rules: Mapping[str, Mapping[str, float]] | None  # rules of single levels, such as {"bottom": {"top_k": 20}}


def apply_options(options: SamplingOptions, defaults: SampleConfig, *, entries: int) -> SampleConfig:
    """Return the settings of a draw: `defaults` with the options that are given.

    `entries` are those of the largest codebook. Raises TypeError for an unknown option and ValueError for a value out
    of range.
    """
    valid_names = SamplingOptions.__annotations__
    if unknown := [name for name in options if name not in valid_names]:
        raise TypeError(f"sampling options must be any of {', '.join(valid_names)}, got {unknown[0]}")
    given_options: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if level_rules := given_options.pop("level_rules", None):
        given_options["level_rules"] = {level: LevelRule(**rule) for level, rule in level_rules.items()}
    config = dataclasses.replace(defaults, **given_options)
    if config.top_k > entries:
        raise ValueError(f"top_k must be at most {entries}, the entries of the largest codebook, got {config.top_k}")
    return config
