"""Ablations: variants of base settings, defined in conf/ablations.yaml. Each variant is a DVC experiment."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import pydantic

from pipeline import dvc, dvc_yaml, params
from pipeline.code_rate import fixed_bits
from pipeline.compose import compose_params, compose_settings
from pipeline.composed_from import CONF, format_override, key_of, settings_of
from pipeline.conf_layers import PACKAGED
from pipeline.experiment_identity import ExperimentIdentities
from pipeline.text import first_few
from stages.config import Params
from stages.errors import UserError
from stages.formats.config_schema import adapter

FILE = CONF / "ablations.yaml"  # of the project; if there is none, the package's is read
BASE = "base"  # prefix of the experiment's name, for variants without changes
Compose = Callable[[tuple[str, ...]], tuple[dict[str, Any], Params]]  # overrides -> contents of params.yaml, settings
MIN_STEPS_PER_WARMUP_STEP = 10  # with --steps, at most a tenth of the steps warm up


class FrozenStageError(UserError):
    """Error of a variant that changes the settings of a frozen stage."""


@dataclass(frozen=True)
class Variant:
    """Changes of the base settings."""

    overrides: tuple[str, ...] = ()
    scale: Mapping[str, float] = field(default_factory=dict)  # pattern of settings -> factor of the base's value
    equal_rate: bool = False  # choose the finest level's codebook size so that an image takes the bits of the base
    last_stage: str = ""  # run only this stage and its dependencies; "" runs all stages


@dataclass(frozen=True)
class Ablation:
    """Claim, and the variants that test it."""

    claim: str
    y: str  # metric on the y axis of the chart, by its name in ablation_results.Result
    variants: Mapping[str, Variant]
    x: str = ""  # setting on the other axis; "" for training FLOP

    @property
    def is_of_sampling(self) -> bool:
        """True if the variants differ in how samples are drawn, and have the same networks."""
        return self.x.startswith("sample.")


@dataclass(frozen=True)
class Experiment:
    """Variant of an ablation as a DVC experiment, whose name identifies its settings, code and images."""

    ablation: str
    variant: str
    name: str
    overrides: tuple[str, ...]  # of the base and of the variant
    changes: tuple[str, ...]  # overrides of the variant only
    settings: Params
    stages: Mapping[str, dvc_yaml.Stage]  # the stages that run
    last_stage: str  # as DVC names it; "" for all stages


def find_file(file: Path = FILE, packaged: Path = PACKAGED) -> Path:
    """Return the path of the project's ablations, or else of the package's."""
    return file if file.is_file() else packaged / FILE.name


def read(file: Path = FILE, packaged: Path = PACKAGED) -> dict[str, Ablation]:
    """Read the ablations of the project, or else those of the package. Raises UserError if the file is not valid."""
    file = find_file(file, packaged)
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
            f"{unknown[0]} is not an ablation.", where=find_file(), fix=f"Use any of: {', '.join(ablations)}", code=2
        )
    return {name: ablations[name] for name in names or ablations}


def experiments(
    ablations: Mapping[str, Ablation],
    base: Sequence[str],
    steps: int | None = None,
    *,
    leave_out: Callable[["FrozenStageError"], None] | None = None,
) -> Iterator[Experiment]:
    """Yield one experiment per variant. Variants without changes have the same name, so they run once.

    `base` are the overrides of the base settings; `steps` replaces the number of steps of every training. A variant
    that changes settings of a frozen stage raises FrozenStageError. With `leave_out` it is skipped instead, and
    `leave_out` receives the error. Raises UserError if the settings of a variant are not valid.
    """
    compose = cache(compose_settings)  # composing takes a second, and variants share the base
    identities = ExperimentIdentities()
    if steps is not None:
        base = _merge(base, _step_overrides(compose(tuple(base))[1], steps))
    for ablation_name, ablation in ablations.items():
        for variant_name, variant in ablation.variants.items():
            try:
                experiment = _experiment(ablation_name, variant_name, variant, base, compose, identities)
            except FrozenStageError as error:
                if leave_out is None:
                    raise
                leave_out(error)
            else:
                yield experiment


def _experiment(
    ablation: str,
    variant_name: str,
    variant: Variant,
    base: Sequence[str],
    compose: Compose,
    identities: ExperimentIdentities,
) -> Experiment:
    base_params, base_settings = compose(tuple(base))
    changes = [*_scale_overrides(variant.scale, base_params), *variant.overrides]
    base = _without_rules(base, changes)
    changes += _rule_changes(base, changes, base_settings)
    if variant.equal_rate:
        _, scaled_settings = compose(tuple(_merge(base, changes)))
        changes.append(_equal_rate_override(base_settings, scaled_settings))
    overrides = _merge(base, changes)
    variant_params, variant_settings = compose(tuple(overrides))
    stages = dvc_yaml.stages(variant_params)
    last_stage = dvc_yaml.find(variant.last_stage, stages).name if variant.last_stage else ""
    if last_stage:
        running = dvc.with_dependencies(stages, [last_stage])
        stages = {name: stage for name, stage in stages.items() if name in running}
    _require_unchanged_frozen(f"{ablation}.variants.{variant_name}", stages, base_params, variant_params)
    prefix = f"{ablation}-{variant_name}" if changes else BASE
    return Experiment(
        ablation=ablation,
        variant=variant_name,
        name=f"{prefix}-{identities.compute(stages, variant_settings)}",
        overrides=tuple(overrides),
        changes=tuple(changes),
        settings=variant_settings,
        stages=stages,
        last_stage=last_stage,
    )


def _deleted_levels(changes: Sequence[str]) -> list[str]:
    return [change.removeprefix("~vqvae.levels.") for change in changes if change.startswith("~vqvae.levels.")]


def _without_rules(base: Sequence[str], changes: Sequence[str]) -> list[str]:
    """Drop the overrides of sampling rules of levels that the changes delete."""
    rules = tuple(f"sample.level_rules.{level}." for level in _deleted_levels(changes))
    return [override for override in base if not key_of(override).startswith(rules)]


def _rule_changes(base: Sequence[str], changes: Sequence[str], base_settings: Params) -> list[str]:
    """Return overrides that delete the sampling rules of deleted levels.

    The coarsest level of a variant gets the rule of the coarsest one of the base, unless it has a rule.
    """
    if not (deleted := _deleted_levels(changes)):
        return []
    composed = compose_params(_merge(base, changes))
    rules = params.look_up(composed, "sample.level_rules") or {}
    overrides = [f"~sample.level_rules.{level}" for level in deleted if level in rules]
    before, now = next(iter(base_settings.vqvae.levels)), next(iter(composed["vqvae"]["levels"]), "")
    rule = base_settings.sample.level_rules.get(before)
    if rule and before in deleted and now not in rules:
        values = {f"sample.level_rules.{now}.{key}": value for key, value in dataclasses.asdict(rule).items()}
        overrides += [f"+{format_override(key, value)}" for key, value in values.items() if value is not None]
    return overrides


def _require_unchanged_frozen(
    variant: str,
    stages: Mapping[str, dvc_yaml.Stage],
    base_params: Mapping[str, Any],
    variant_params: Mapping[str, Any],
) -> None:
    """Raise FrozenStageError if a variant changes settings of a frozen stage: DVC does not run it."""
    for stage in stages.values():
        changed_keys = [
            key for key in stage.params if params.look_up(base_params, key) != params.look_up(variant_params, key)
        ]
        if stage.frozen and changed_keys:
            raise FrozenStageError(
                f"{variant} changes {first_few(changed_keys)}, settings of the stage {stage.cli_name}, "
                "which is frozen.",
                where=dvc_yaml.FILE,
                fix="Choose other ablations. Or, to train the stage, delete its line `frozen: true`.",
                code=2,
            )


def _merge(base: Sequence[str], changes: Sequence[str]) -> list[str]:
    """Append changes to overrides. Drop overrides of a setting that a change sets or deletes."""
    changed_keys = {key_of(change) for change in changes}
    # ~priors.top and ~prior@priors.top delete the settings below priors.top.
    deleted_prefixes = tuple(f"{key_of(change).rpartition('@')[2]}." for change in changes if change.startswith("~"))
    remaining = [
        override
        for override in base
        if key_of(override) not in changed_keys and not key_of(override).startswith(deleted_prefixes)
    ]
    return [*remaining, *changes]


def _step_overrides(settings: Params, steps: int) -> list[str]:
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


def _scale_overrides(scale: Mapping[str, float], base_params: Mapping[str, Any]) -> Iterator[str]:
    """Yield overrides that multiply integer settings of the base and round the result; a positive one stays positive.

    Raises UserError if a pattern matches no setting, or one that is not an integer.
    """
    values = settings_of(base_params)
    for pattern, factor in scale.items():
        matching = {key: value for key, value in values.items() if fnmatchcase(key, pattern)}
        if not matching:
            raise UserError(
                f"{pattern} matches no setting.",
                where=find_file(),
                fix=f"Use settings such as {first_few(list(values), 4)}",
                code=2,
            )
        for key, value in matching.items():
            if type(value) is not int:
                raise UserError(
                    f"{pattern} must match integers, which can be scaled, but {key} is {value!r}.",
                    where=find_file(),
                    fix=f"Use a pattern of fewer settings, or set {key} under overrides.",
                    code=2,
                )
            yield format_override(key, max(min(value, 1), round(value * factor)))


def _equal_rate_override(base: Params, variant: Params) -> str:
    """Return the override of the finest level's codebook size with which an image takes the bits of the base."""
    name, finest = list(variant.vqvae.levels.items())[-1]
    num_codes = variant.vqvae.grids(variant.dataset.image_size)[name] ** 2
    coarser_bits = fixed_bits(variant) - num_codes * math.log2(finest.entries)
    entries = round(2 ** ((fixed_bits(base) - coarser_bits) / num_codes))
    return format_override(f"vqvae.levels.{name}.entries", entries)
