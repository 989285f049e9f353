"""Settings of one stage: the sections of params.yaml that dvc.yaml lists for it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from pipeline.dvc_yaml import Stage
from stages.config import NEUTRAL, Params


def sections_of(stage: Stage, settings: Params) -> dict[str, Any]:
    """Return the settings that dvc.yaml lists for a stage, by their keys there."""
    return {name: _section(settings, name) for name in stage.params}


def _section(settings: Params, name: str) -> Any:
    """Return a section, or the entry of a mapping: priors.top."""
    section, _, key = name.partition(".")
    return getattr(settings, section)[key] if key else getattr(settings, section)


def plain_settings(section: Any) -> Any:
    """Convert settings to plain data.

    A setting that a later release has added is left out at its neutral value, at which results are as they were without
    it. So the release keeps finished results and half-finished state.
    """
    if dataclasses.is_dataclass(section) and not isinstance(section, type):
        return {
            field.name: plain_settings(getattr(section, field.name))
            for field in dataclasses.fields(section)
            if NEUTRAL not in field.metadata or getattr(section, field.name) != field.metadata[NEUTRAL]
        }
    if isinstance(section, Mapping):
        return {name: plain_settings(value) for name, value in section.items()}
    return section
