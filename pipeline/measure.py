"""Measured time of each stage: a few training steps on made-up images and codes, in this process, without Ray.

A worker of the stage is measured with its share of the batch and its processors; the workers are assumed not to slow
each other down. torch.compile is left out, because it takes a minute to start.

B images, H x W pixels or codes.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.priors import Grid, Prior, build
from models.recompute import recompute_activations
from models.sampling import Sampler
from models.vqvae import VQVAE
from stages.config import Params, TrainConfig
from stages.images.decode import RejectedImage, decode, encode
from stages.images.listing import Listing
from stages.images.overview import count_splits, sample_images
from stages.images.sources import UnreadableFile, open_source
from stages.images.tensors import to_float
from stages.prior import PriorObjective
from stages.runtime.device import best_device
from stages.training.checkpoint_state import TrainableModel
from stages.training.code_batches import CodeBatch
from stages.training.distributed import DistributedContext
from stages.training.gradient_accumulation import GradientAccumulator, autocast, split_batch
from stages.training.objective import Objective
from stages.training.optimizer import learning_rate
from stages.vqvae import VQVAEObjective

BUDGET_S = 60.0  # for all measurements
MIN_CALLS, MAX_CALLS = 3, 8  # of which the fastest counts
DECODED_IMAGES = 32
DRAWN_ROWS = 2  # rows of codes of a sample


@dataclass(frozen=True)
class Workload:
    """Numbers of images that the stages process."""

    train: int
    other: int  # validation and test images


class StageTimer:
    """Measures the stages of some settings one after another, within a time limit for all."""

    def __init__(self, settings: Params, classes: int, device: torch.device, budget_s: float):
        self.settings, self.classes, self.device = settings, classes, device
        self.dist = DistributedContext(device=device)
        # The VQ-VAE trains, evaluates and encodes; a prior trains, evaluates and draws twice.
        self.limit_s = budget_s / (3 + 4 * len(settings.priors))

    def vqvae(self, images: Workload) -> dict[str, float]:
        """Measure training and encoding; return the seconds of the stages vqvae and codes."""
        settings, size = self.settings, self.settings.dataset.image_size
        config, codes = settings.train_vqvae, settings.codes
        objective = VQVAEObjective(VQVAE(settings.vqvae), np.empty(0))
        with _one_worker(settings, "vqvae") as workers:
            share = max(_share(config, workers), codes.batch_size)
            batch = torch.randint(0, 256, (share, size, size, 3), dtype=torch.uint8)
            training_s = self._training(objective, lambda count: batch[:count], config, (images.other,), workers)
        rows = images.train * codes.copies + images.other

        def encode(count: int) -> None:
            with torch.inference_mode():
                objective.network.eval().encode(to_float(batch[:count], self.device))

        with _one_worker(settings, "codes") as workers:
            codes_s = self._seconds(encode, codes.batch_size) / codes.batch_size * rows / workers
        return {"vqvae": training_s, "codes": codes_s}

    def prior(self, level: str, images: Workload) -> dict[str, float]:
        """Measure training and drawing codes; return the seconds of the prior and its part of the stage sample."""
        config = self.settings.priors[level].train
        network = self._build_prior(level)
        with _one_worker(self.settings, f"prior_{level}") as workers:
            share = _share(config, workers)
            codes = {name: grids.to(torch.uint16) for name, grids in self._random_codes(share, level).items()}
            labels = torch.zeros(share, dtype=torch.int64)

            def batch(count: int) -> CodeBatch:
                grids = {name: grids[:count] for name, grids in codes.items()}
                return CodeBatch(grids, labels[:count] if self.classes else None)

            evaluated = (images.train, images.other)
            training_s = self._training(PriorObjective(network, level), batch, config, evaluated, workers)
        with _one_worker(self.settings, "sample") as workers:
            return {f"prior_{level}": training_s, "sample": self._sampling(network, level, workers)}

    def _training(
        self,
        objective: Objective,
        batch: Callable[[int], Any],
        config: TrainConfig,
        evaluated: tuple[int, ...],
        workers: int,
    ) -> float:
        """Return the seconds of a training with its evaluations. `batch` returns a batch of any number of images.

        `evaluated` are the images of the splits.
        """
        objective.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if config.recompute_activations:
            recompute_activations(objective.network)
        model = TrainableModel(objective.network, config)
        gradients = GradientAccumulator(objective, replace(config, compile=False), seed=0, dist=self.dist)

        def train(count: int) -> None:
            objective.train()
            sums, _ = gradients.accumulate(batch(count), 0, torch.zeros(1)).in_flight.wait()
            model.apply_gradients(learning_rate(config, 0), config.max_grad_norm)
            objective.absorb(sums)
            model.update_ema()

        def evaluate(count: int) -> None:
            objective.network.eval()
            with torch.inference_mode(), autocast(config, self.device):
                for part in split_batch(batch(count), gradients.evaluation_size):
                    objective.measure(objective.network, part, self.dist)

        share = _share(config, workers)
        images = sum(min(count, config.evaluate_images) for count in evaluated) / workers
        evaluation_s = self._seconds(evaluate, share) / share * images
        return config.steps * self._seconds(train, share) + config.steps / config.evaluate_every * evaluation_s

    def _sampling(self, network: Prior, level: str, workers: int) -> float:
        """Return the seconds to draw the codes of all samples. Only the last rows of a batch are drawn."""
        config = self.settings.sample
        batch_size = min(config.batch_size, config.count)
        codes = {name: grids.to(self.device) for name, grids in self._random_codes(batch_size, level).items()}
        labels = torch.zeros(batch_size, dtype=torch.int64, device=self.device) if self.classes else None
        sampler = Sampler(network.float(), batch_size=batch_size, method=config.method)

        def draw(rows: int, count: int) -> None:
            coarser = {name: grids[:count] for name, grids in codes.items() if name != level}
            sampler.draw(
                seed=0,
                sample_ids=torch.arange(count),
                coarser=coarser,
                labels=None if labels is None else labels[:count],
                prefix=codes[level][:count],
                prefix_rows=network.height - rows,
            )

        rows = min(DRAWN_ROWS, network.height)  # without the rows before them, which are computed at once
        rows_s = self._seconds(partial(draw, rows), batch_size) - self._seconds(partial(draw, 0), batch_size)
        parts = math.ceil(config.count / config.images_per_part)
        batches = math.ceil(config.count / batch_size)
        return max(0.0, rows_s) / rows * network.height * batches / min(workers, parts)

    def _build_prior(self, level: str) -> Prior:
        vqvae, size = self.settings.vqvae, self.settings.dataset.image_size
        grids = {name: Grid(vqvae.levels[name].entries, side, side) for name, side in vqvae.grids(size).items()}
        names = list(grids)
        coarser = {name: grids[name] for name in names[: names.index(level)]}
        side = grids[level].height
        return build(
            self.settings.priors[level].network,
            entries=grids[level].entries,
            grid=(side, side),
            coarser=coarser,
            classes=self.classes,
        ).to(self.device)

    def _random_codes(self, count: int, last: str) -> dict[str, torch.Tensor]:
        """Return random codes, (count, H, W), of the levels up to the last."""
        codes = {}
        for name, side in self.settings.vqvae.grids(self.settings.dataset.image_size).items():
            codes[name] = torch.randint(0, self.settings.vqvae.levels[name].entries, (count, side, side))
            if name == last:
                break
        return codes

    def _seconds(self, call: Callable[[int], object], count: int) -> float:
        """Return the seconds of a call with `count` images: extrapolated from fewer if it would exceed the limit."""
        call(1)  # a warm-up
        image_s = self._time(call, 1)
        measured = max(1, min(count, int(self.limit_s / (MIN_CALLS * image_s))))
        deadline, times = time.monotonic() + self.limit_s / 2, [image_s] if measured == 1 else []
        while measured > 1 and len(times) < MAX_CALLS and (len(times) < MIN_CALLS - 1 or time.monotonic() < deadline):
            times.append(self._time(call, measured))
        return min(times) * count / measured

    def _time(self, call: Callable[[int], object], count: int) -> float:
        start = time.monotonic()
        call(count)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.monotonic() - start


def measured_stages(settings: Params) -> list[str]:
    """List the stages that `measure` can measure."""
    return ["shard", "vqvae", "codes", *(f"prior_{level}" for level in settings.priors), "sample"]


def measure(settings: Params, listing: Listing | None, classes: int, *, budget_s: float = BUDGET_S) -> dict[str, float]:
    """Return the seconds of each stage that can be measured, by name. `budget_s` limits all measurements.

    Without a listing of the images, the stages that process each image are left out.
    """
    splits = count_splits(listing) if listing is not None else {"train": 0, "validation": 0, "test": 0}
    images = Workload(splits["train"], splits["validation"] + splits["test"])
    seconds: dict[str, float] = {}
    if listing is not None:
        seconds |= _decoding(settings, listing)
    timer = StageTimer(settings, classes, best_device(), budget_s)
    seconds |= timer.vqvae(images)
    if listing is None:
        del seconds["codes"]
    for level in settings.priors:
        times = timer.prior(level, images)
        sample_s = seconds.pop("sample", 0.0) + times.pop("sample")
        seconds |= times | {"sample": sample_s}
    return seconds


def _decoding(settings: Params, listing: Listing) -> dict[str, float]:
    """Return the seconds of the stage shard, from decoding a few images; nothing if none can be decoded."""
    dataset = settings.dataset
    source = open_source(Path(dataset.source))
    start, decoded = time.monotonic(), 0
    for image in sample_images(listing.images, DECODED_IMAGES):
        with suppress(UnreadableFile, RejectedImage):
            encode(decode(source.read(image.member), dataset).pixels, dataset)
            decoded += 1
    seconds, workers = time.monotonic() - start, settings.cluster.for_stage("shard").min_workers
    return {"shard": seconds / decoded * len(listing.images) / workers} if decoded else {}


def _share(config: TrainConfig, workers: int) -> int:
    """Return the images per step of the worker that has most."""
    return math.ceil(config.batch_size / workers)


@contextmanager
def _one_worker(settings: Params, stage: str) -> Iterator[int]:
    """Compute with the processors of one worker of a stage; yield the number of its workers, of a range the fewest."""
    cluster, threads = settings.cluster.for_stage(stage), torch.get_num_threads()
    torch.set_num_threads(max(1, int(cluster.cpus_per_worker)))
    try:
        yield cluster.min_workers
    finally:
        torch.set_num_threads(threads)
