"""Settings of one stage: the sections of params.yaml that dvc.yaml lists for it."""

from typing import Any

from pipeline.dvc_yaml import Stage
from stages.config import Params


def sections_of(stage: Stage, settings: Params) -> dict[str, Any]:
    """Return the settings that dvc.yaml lists for a stage, by their keys there."""
    return {name: _section(settings, name) for name in stage.params}


def _section(settings: Params, name: str) -> Any:
    """Return a section, or the entry of a mapping: priors.top."""
    section, _, key = name.partition(".")
    return getattr(settings, section)[key] if key else getattr(settings, section)
