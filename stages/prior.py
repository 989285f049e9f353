"""Train the prior of one level: what its codes are likely to be, given the coarser ones and the label.

reads   codes    codes of every image               formats/codes.py
writes  out      the trained prior                  formats/model_file.py
        metrics  its last measurements              formats/curves.py
        plots    its curves                         formats/curves.py
"""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from models.priors import Prior, build, nll
from stages.config import PriorStageConfig, TrainConfig
from stages.errors import UserError
from stages.formats import curves, model_file
from stages.formats.codes import Codes, CodeSet, open_codes
from stages.runtime.context import StageContext
from stages.training.checkpoint import Checkpoints
from stages.training.loop import Data, MetricSums, Objective, Step, Worker, train
from stages.training.ray_train import train_or_load
from stages.training.sampler import GlobalBatchSampler, ShuffledStream


class Batch(NamedTuple):
    """Codes of some images, level by level, and their labels where there are classes."""

    codes: dict[str, Tensor]
    labels: Tensor | None


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
    """Train on the training images' codes, augmented copies among them; measure on those of validation images."""
    found = open_codes(codes)
    found.found.verify()
    if level not in found.levels:
        raise UserError(
            f"There are no codes of level {level!r}, only of {', '.join(found.levels)}.",
            where=codes,
            fix="Name the prior after a level of vqvae.levels.",
            code=2,
        )
    training = found.split("train", levels=())
    arguments = {"level": level, "codes": codes.absolute(), "prior": prior, "seed": seed}
    network = _network(found, level, prior)
    history = train_or_load(train_worker, arguments, prior.train, network=network, context=context)
    grid = found.levels[level]
    meta = {
        "network": model_file.network_meta(prior.network),
        "level": level,
        "entries": grid.entries,
        "grid": [grid.height, grid.width],
        "coarser": {name: found.levels[name]._asdict() for name in _coarser(found, level)},
        "classes": list(found.classes),
        "label_counts": np.bincount(training.labels[training.copies == 0], minlength=len(found.classes)).tolist()
        if found.classes
        else [],
        "vqvae": found.vqvae,
        "codes": found.found.digest,
    }
    model_file.write(out, "prior", network.state_dict(), meta, history=history, pictures={})
    curves.write_metrics(metrics, curves.last(history))
    curves.write_plot(plots, history)


def train_worker(
    *, worker: Worker, context: StageContext, level: str, codes: Path, prior: PriorStageConfig, seed: int
) -> None:
    """Be one of the workers that train together."""
    found = open_codes(codes)
    torch.manual_seed(seed)
    network = _network(found, level, prior)
    checkpoints = Checkpoints.of(context, prior.train.keep_checkpoints)
    data = _data(found, [*_coarser(found, level), level], prior.train, seed, worker)
    objective = Predict(network, level)
    train(objective, data, prior.train, seed=seed, worker=worker, checkpoints=checkpoints, reporter=context.reporter)


def _network(codes: Codes, level: str, prior: PriorStageConfig) -> Prior:
    grid = codes.levels[level]
    return build(
        prior.network,
        entries=grid.entries,
        grid=(grid.height, grid.width),
        coarser={name: codes.levels[name] for name in _coarser(codes, level)},
        classes=len(codes.classes),
    )


class Predict(Objective):
    """Predict each code from those before it."""

    network: Prior

    def __init__(self, network: Prior, level: str):
        super().__init__()
        self.network, self.level = network, level

    def zeros(self) -> MetricSums:
        return {"codes": torch.zeros(1), "nats": torch.zeros(1)}

    def forward(self, batch: Batch, step: int, worker: Worker) -> Step:
        totals = self.measure(self.network, batch, worker)
        return Step(totals["nats"].sum() / totals["codes"].sum(), [], totals)

    def measure(self, network: nn.Module, batch: Batch, worker: Worker) -> MetricSums:
        codes = {name: grid.to(worker.device, non_blocking=True).long() for name, grid in batch.codes.items()}
        labels = None if batch.labels is None else batch.labels.to(worker.device)
        target = codes.pop(self.level)
        nats = nll(network(target, codes, labels), target).sum()
        return {"codes": torch.full((1,), float(target.numel()), device=worker.device), "nats": nats[None]}

    def summarize(self, totals: MetricSums) -> dict[str, float]:
        nats = (totals["nats"] / totals["codes"]).item()
        return {"nll_nats_per_code": nats, "nll_bits_per_code": nats / math.log(2)}


def _coarser(found: Codes, level: str) -> list[str]:
    names = list(found.levels)
    return names[: names.index(level)]


def _data(found: Codes, levels: list[str], config: TrainConfig, seed: int, worker: Worker) -> Data:
    """Read the codes of some levels into memory: at 2 bytes each they are small beside images."""
    training = found.split("train", levels)
    order = ShuffledStream(len(training), seed)

    def batch(split: CodeSet, rows: np.ndarray) -> Batch:
        codes = {level: torch.from_numpy(split.codes[level][rows]) for level in levels}
        return Batch(codes, torch.from_numpy(split.labels[rows]) if found.classes else None)

    def steps(start: int) -> Iterator[Batch]:
        batches = GlobalBatchSampler(
            order, config.batch_size, start=start, stop=config.steps, rank=worker.rank, workers=worker.count
        )
        for picks in batches:
            yield batch(training, np.array([pick.image for pick in picks]))

    def held_out(split: CodeSet) -> Iterator[Batch]:
        rows = np.arange(worker.rank, min(len(split), config.evaluate_images), worker.count)
        for start in range(0, len(rows), config.batch_size):
            yield batch(split, rows[start : start + config.batch_size])

    seen = np.flatnonzero(training.copies == 0)[: config.evaluate_images]
    splits = {"seen": training.take(seen)}
    if "validation" in found.splits:
        splits["validation"] = found.split("validation", levels)
    return Data(steps, {name: partial(held_out, split) for name, split in splits.items()})
