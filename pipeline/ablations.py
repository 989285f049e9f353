"""Ablations: variants of the base settings, defined as data in conf/ablations.yaml, each one DVC experiment."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import pydantic

from pipeline import dvc, dvc_yaml, params
from pipeline.compose import compose_settings
from pipeline.composed_from import CONF, format_override, key_of, settings_of
from pipeline.conf_layers import PACKAGED
from pipeline.experiment_identity import ExperimentIdentities
from pipeline.text import first_few
from stages.config import Params
from stages.errors import UserError
from stages.formats.config_schema import adapter

FILE = CONF / "ablations.yaml"  # of the project; without it, that of the package
BASE = "base"  # name of the experiment of a variant without changes
Compose = Callable[[tuple[str, ...]], tuple[dict[str, Any], Params]]  # overrides -> params.yaml and settings
MIN_STEPS_PER_WARMUP_STEP = 10  # with --steps, at most a tenth of the steps warm up


@dataclass(frozen=True)
class Variant:
    """Changes of the base settings."""

    overrides: tuple[str, ...] = ()
    scale: Mapping[str, float] = field(default_factory=dict)  # pattern of settings -> factor
    equal_rate: bool = False  # set the entries of the finest level so that the codes have the bits of the base's
    stage: str = ""  # last stage that runs; "" for all


@dataclass(frozen=True)
class Ablation:
    """Question, and the variants that answer it."""

    claim: str
    y: str  # number of its chart
    variants: Mapping[str, Variant]


@dataclass(frozen=True)
class Experiment:
    """Variant of an ablation as a DVC experiment, whose name identifies its settings, code and images."""

    ablation: str
    variant: str
    name: str
    overrides: tuple[str, ...]  # all, of the base and of the variant
    changes: tuple[str, ...]  # those of the variant
    settings: Params
    stages: Mapping[str, dvc_yaml.Stage]  # that run
    target: str  # last stage that runs; "" for all


def read(file: Path = FILE, packaged: Path = PACKAGED) -> dict[str, Ablation]:
    """Read the ablations of the project, or else those of the package. Raises UserError if the file is not valid."""
    if not file.is_file():
        file = packaged / FILE.name
    try:
        return dict(adapter(Mapping[str, Ablation]).validate_python(params.read(file)))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"{'.'.join(map(str, first['loc']))} is not valid: {first['msg']}.",
            where=file,
            fix="The comment at the top of the file lists the keys.",
            code=2,
        ) from error


def select(names: Sequence[str], ablations: Mapping[str, Ablation]) -> dict[str, Ablation]:
    """Return the named ablations, or all without names. Raises UserError for an unknown name."""
    if unknown := [name for name in names if name not in ablations]:
        raise UserError(
            f"{unknown[0]} is not an ablation.", where=FILE, fix=f"Use any of: {', '.join(ablations)}", code=2
        )
    return {name: ablations[name] for name in names or ablations}


def experiments(
    ablations: Mapping[str, Ablation], base: Sequence[str], steps: int | None = None
) -> Iterator[Experiment]:
    """Yield one experiment per variant; those without changes share one name.

    `base` are the overrides of the base settings; `steps` replaces the number of steps of every training. Raises
    UserError if a variant does not compose to valid settings, or changes those of a frozen stage.
    """
    compose = cache(compose_settings)  # composing takes a second, and several variants may be the base
    identities = ExperimentIdentities()
    if steps is not None:
        base = _merge(base, _budget(compose(tuple(base))[1], steps))
    for ablation_name, ablation in ablations.items():
        for variant_name, variant in ablation.variants.items():
            yield _experiment(ablation_name, variant_name, variant, base, compose, identities)


def _experiment(
    ablation: str,
    variant_name: str,
    variant: Variant,
    base: Sequence[str],
    compose: Compose,
    identities: ExperimentIdentities,
) -> Experiment:
    data, settings = compose(tuple(base))
    changes = [*_scaled(variant.scale, data), *variant.overrides]
    if variant.equal_rate:
        changes.append(_equal_rate(settings, compose(tuple(_merge(base, changes)))[1]))
    overrides = _merge(base, changes)
    composed, changed = compose(tuple(overrides))
    stages = dvc_yaml.stages(composed)
    target = dvc_yaml.find(variant.stage, stages).name if variant.stage else ""
    running = dvc.with_dependencies(stages, [target]) if target else set(stages)
    stages = {name: stage for name, stage in stages.items() if name in running}
    _require_unchanged_frozen(f"{ablation}.variants.{variant_name}", stages, data, composed)
    prefix = f"{ablation}-{variant_name}" if changes else BASE
    name = f"{prefix}-{identities.compute(stages, changed)}"
    return Experiment(ablation, variant_name, name, tuple(overrides), tuple(changes), changed, stages, target)


def _require_unchanged_frozen(
    variant: str, stages: Mapping[str, dvc_yaml.Stage], base: Mapping[str, Any], changed: Mapping[str, Any]
) -> None:
    """Raise UserError if a variant changes settings of a stage that DVC does not run: its result would be the base's.

    `base` and `changed` are contents of params.yaml.
    """
    for stage in stages.values():
        changes = [key for key in stage.params if params.look_up(base, key) != params.look_up(changed, key)]
        if stage.frozen and changes:
            raise UserError(
                f"{variant} changes {first_few(changes)}, settings of the stage {stage.cli_name}, which is frozen.",
                where=dvc_yaml.FILE,
                fix="Name ablations that leave them as they are. Or, to train it, delete the line `frozen: true`.",
                code=2,
            )


def _merge(base: Sequence[str], changes: Sequence[str]) -> list[str]:
    """Add changes to overrides. A change replaces overrides of the same setting and of settings that it deletes."""
    keys = {key_of(change) for change in changes}
    deleted = tuple(f"{key_of(change).rpartition('@')[2]}." for change in changes if change.startswith("~"))
    kept_overrides = [
        override
        for override in base
        if key_of(override) not in keys and not (deleted and key_of(override).startswith(deleted))
    ]
    return [*kept_overrides, *changes]


def _budget(settings: Params, steps: int) -> list[str]:
    """Return the overrides that set the steps of every training, with a warm-up that fits."""
    trainings = {"train_vqvae": settings.train_vqvae}
    trainings |= {f"priors.{level}.train": prior.train for level, prior in settings.priors.items()}
    trainings |= {f"classifiers.{name}.train": config.train for name, config in settings.classifiers.items()}
    return [
        override
        for key, train in trainings.items()
        for override in (
            f"{key}.steps={steps}",
            f"{key}.warmup_steps={min(train.warmup_steps, steps // MIN_STEPS_PER_WARMUP_STEP)}",
        )
    ]


def _scaled(scale: Mapping[str, float], data: Mapping[str, Any]) -> Iterator[str]:
    """Yield overrides that multiply settings of the base, rounded; 1 or more stays so. Raises UserError without any."""
    values = settings_of(data)
    for pattern, factor in scale.items():
        matching = {key: value for key, value in values.items() if fnmatchcase(key, pattern)}
        if not matching:
            raise UserError(
                f"{pattern} matches no setting.",
                where=FILE,
                fix=f"Use settings such as {first_few(list(values), 4)}",
                code=2,
            )
        for key, value in matching.items():
            yield format_override(key, max(min(value, 1), round(value * factor)))


def _equal_rate(base: Params, changed: Params) -> str:
    """Return the override of the finest level's entries that gives the codes as many bits as those of the base."""
    name, finest = list(changed.vqvae.levels.items())[-1]
    codes = {level: side**2 for level, side in changed.vqvae.grids(changed.dataset.image_size).items()}
    others = fixed_bits(changed) - codes[name] * math.log2(finest.entries)
    return format_override(f"vqvae.levels.{name}.entries", round(2 ** ((fixed_bits(base) - others) / codes[name])))


def fixed_bits(settings: Params) -> float:
    """Compute the bits of an image's codes at log2 K bits per code."""
    grids = settings.vqvae.grids(settings.dataset.image_size)
    return sum(side**2 * math.log2(settings.vqvae.levels[level].entries) for level, side in grids.items())
