"""Compute of one stage, for the facts of its run: devices, and for a training also images, FLOP and settings."""

from collections.abc import Mapping
from typing import Any

from pipeline.dvc_yaml import Stage
from stages.config import AugmentConfig, Params, TrainConfig
from stages.tracking.provenance import device_kind


def compute_facts(stage: Stage, settings: Params) -> dict[str, Any]:
    """Describe the devices of a stage and what a training computes: the argument `compute` of `record_facts`."""
    cluster = settings.cluster.for_stage(stage.cli_name)
    facts: dict[str, Any] = {
        "device": device_kind(has_gpu=cluster.gpus_per_worker > 0),
        "devices": cluster.max_workers * (cluster.gpus_per_worker or 1),  # of a range, never too few
    }
    train = _train_config(stage, settings)
    if train is None:
        return facts
    from pipeline.commands.plan import count  # imports torch

    # Labels are looked up and added, which takes no matrix product: the number of classes does not matter.
    trainings = count(settings, classes=0)
    return facts | {
        "images": train.steps * train.batch_size,
        "flop": next(training.training_flops for training in trainings if training.stage == stage.cli_name),
        "batch_size": train.batch_size,
        "learning_rate": f"{train.learning_rate:g}, {_schedule(train)}",
        "augmentation": _augmentation(stage, settings),
    }


def forward_flops(facts: Mapping[str, Any]) -> float:
    """Return the operations of a forward pass per image from the facts of a training; 0 for another stage."""
    # A training step takes three times as many.
    return facts["flop"] / (3 * facts["images"]) if "flop" in facts else 0.0


def _train_config(stage: Stage, settings: Params) -> TrainConfig | None:
    if stage.module == "vqvae":
        return settings.train_vqvae
    return settings.priors[stage.key].train if stage.module == "prior" else None


def _schedule(train: TrainConfig) -> str:
    warmup = f", {train.warmup_steps:,} warm-up steps" if train.warmup_steps else ""
    return f"{train.lr_schedule}{warmup}"


def _augmentation(stage: Stage, settings: Params) -> str:
    """Describe the augmentation of the training data: for a prior, the copies of each image that were encoded."""
    augment = _format_augmentation(settings.augment)
    if stage.module == "vqvae":
        return augment
    copies = settings.codes.copies
    return f"{copies} copies: 1 original, {copies - 1} with {augment}" if copies > 1 else "none"


def _format_augmentation(augment: AugmentConfig) -> str:
    shift = f"shift of up to {augment.max_shift} pixels" if augment.max_shift else ""
    return ", ".join(filter(None, ("flip" if augment.flip else "", shift))) or "none"
