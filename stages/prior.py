"""Train the prior of one level: the distribution of its codes, given the coarser codes and the label.

reads   codes    codes of every image               formats/codes.py
writes  out      the trained prior                  formats/model_file.py
        metrics  its NLL                            formats/curves.py
        plots    its curves, in LEVEL.csv           formats/curves.py

B images per rank and step, H x W codes, K codebook entries.
"""

import math
from pathlib import Path

import numpy as np
import torch
from torch import nn

from models.priors import Prior, build, nll
from models.quantizer import BatchSlice
from stages.config import PriorStageConfig
from stages.errors import UserError
from stages.formats import curves, model_file
from stages.formats.codes import Codes, open_codes
from stages.runtime.context import StageContext
from stages.runtime.verification import verify_once
from stages.training.checkpoint import Checkpoints
from stages.training.code_batches import CodeBatch, code_data
from stages.training.distributed import DistributedContext
from stages.training.loop import TrainingLoop
from stages.training.objective import MetricSums, Objective, StepResult
from stages.training.ray_train import train_or_load


def run(
    level: str,
    codes: Path,
    out: Path,
    metrics: Path,
    plots: Path,
    *,
    prior: PriorStageConfig,
    seed: int,
    context: StageContext,
) -> None:
    """Train on the codes of training images and their augmented copies; evaluate on those of validation images.

    Raises UserError if the codes are damaged or lack the level, or if training fails.
    """
    dataset = open_codes(codes)
    verify_once(dataset.artifact)
    if level not in dataset.levels:
        raise UserError(
            f"The prior's level must be one of {', '.join(dataset.levels)}, got {level!r}.",
            where=codes,
            fix="Name the prior after a level of vqvae.levels.",
            code=2,
        )
    arguments = {"level": level, "codes": codes.absolute(), "prior": prior, "seed": seed}
    network, label_counts = build_network(dataset, level, prior), count_labels(dataset)
    history = train_or_load(train_worker, arguments, prior.train, network=network, context=context)
    grid = dataset.levels[level]
    meta = {
        "network": model_file.network_meta(prior.network),
        "level": level,
        "entries": grid.entries,
        "grid": [grid.height, grid.width],
        "coarser": {name: dataset.levels[name]._asdict() for name in coarser_levels(dataset, level)},
        "classes": list(dataset.classes),
        "label_counts": label_counts,
        "vqvae": dataset.vqvae,
        "codes": dataset.artifact.digest,
    }
    model_file.write(out, "prior", network.state_dict(), meta, history=history, images={})
    last = curves.last(history)
    nll_by_split = {split: last[split]["nll_nats_per_code"] for split in ("validation", "seen") if split in last}
    # Without validation images, the NLL of training images is all there is.
    curves.write_metrics(metrics, {"nll": next(iter(nll_by_split.values())), "nll_train": nll_by_split["seen"]})
    curves.write_curves_plot(plots / f"{level}.csv", history, {"nll_nats_per_code": "nll"}, series=level)


def train_worker(
    *, dist: DistributedContext, context: StageContext, level: str, codes: Path, prior: PriorStageConfig, seed: int
) -> None:
    """Train in one process of `dist.world_size`."""
    dataset = open_codes(codes)
    torch.manual_seed(seed)  # every rank initializes the same weights
    objective = PriorObjective(build_network(dataset, level, prior), level)
    checkpoints = Checkpoints.for_stage(context, prior.train.keep_checkpoints)
    levels = [*coarser_levels(dataset, level), level]
    data = code_data(dataset, levels, prior.train, seed=seed, dist=dist, context=context)
    TrainingLoop(
        objective, data, prior.train, seed=seed, dist=dist, checkpoints=checkpoints, reporter=context.reporter
    ).run()


class PriorObjective(Objective):
    """Negative log-likelihood per code."""

    network: Prior

    def __init__(self, network: Prior, level: str):
        super().__init__()
        self.network, self.level = network, level

    def zero_metrics(self) -> MetricSums:
        return {"codes": torch.zeros(1), "nats": torch.zeros(1)}

    def forward(self, batch: CodeBatch, batch_slice: BatchSlice, dist: DistributedContext) -> StepResult:
        metrics = self.measure(self.network, batch, dist)
        loss = metrics["nats"].sum() / metrics["codes"].sum()
        return StepResult(loss, {}, metrics)

    def measure(self, network: nn.Module, batch: CodeBatch, dist: DistributedContext) -> MetricSums:
        codes = {name: grid.to(dist.device, non_blocking=True).long() for name, grid in batch.codes.items()}
        labels = None if batch.labels is None else batch.labels.to(dist.device)
        target = codes.pop(self.level)  # (B, H, W); the rest are the coarser levels
        nats = nll(network(target, codes, labels), target).sum()
        return {"codes": torch.full((1,), float(target.numel()), device=dist.device), "nats": nats[None]}

    def summarize(self, sums: MetricSums) -> dict[str, float]:
        nats = (sums["nats"] / sums["codes"]).item()
        return {"nll_nats_per_code": nats, "nll_bits_per_code": nats / math.log(2)}


def build_network(dataset: Codes, level: str, prior: PriorStageConfig) -> Prior:
    """Build the untrained prior of a level for the grids, codebooks and classes of a dataset of codes."""
    grid = dataset.levels[level]
    return build(
        prior.network,
        entries=grid.entries,
        grid=(grid.height, grid.width),
        coarser={name: dataset.levels[name] for name in coarser_levels(dataset, level)},
        classes=len(dataset.classes),
    )


def coarser_levels(dataset: Codes, level: str) -> list[str]:
    """Return the names of the levels before `level`, coarse to fine."""
    names = list(dataset.levels)
    return names[: names.index(level)]


def count_labels(dataset: Codes) -> list[int]:
    """Count the training images of each class, without augmented copies; empty without classes."""
    if not dataset.classes:
        return []
    dataset.require_split("train")
    counts = np.zeros(len(dataset.classes), np.int64)
    for rows in dataset.by_file("train", levels=()):
        counts += np.bincount(rows.labels[rows.copies == 0], minlength=len(dataset.classes))
    return counts.tolist()
