"""Measured time of each stage: a few training steps on made-up images and codes, in this process, without Ray.

A worker of the cluster is measured with its share of the batch and its processors; the workers are assumed not to slow
each other down. torch.compile is left out, because it takes a minute to start.

B images, H x W pixels or codes.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from models.priors import Grid, Prior, build
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
from stages.training.code_batches import CodeBatch
from stages.training.distributed import DistributedContext
from stages.training.loop import autocast
from stages.training.objective import Objective
from stages.training.optimizer import learning_rate
from stages.training.state import TrainableModel
from stages.vqvae import VQVAEObjective

BUDGET_S = 60.0  # for all measurements
MAX_CALLS = 8  # of which the fastest counts; the first is a warm-up
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
        self.workers = settings.cluster.workers
        self.dist = DistributedContext(device=device)
        self.networks = 1 + len(settings.priors)
        self.limit_s = budget_s / (2 * self.networks)  # each network trains, and encodes or draws

    def vqvae(self, images: Workload) -> dict[str, float]:
        """Measure training and encoding; return the seconds of the stages vqvae and codes."""
        settings, size = self.settings, self.settings.dataset.image_size
        objective = VQVAEObjective(
            VQVAE(settings.vqvae), torch.empty(0).numpy(), settings.train_vqvae.batch_size, settings.seed
        )
        batch = torch.randint(0, 256, (self._share(settings.train_vqvae), size, size, 3), dtype=torch.uint8)
        training_s = self._training(objective, batch, settings.train_vqvae, (images.other,))
        rows = images.train * settings.codes.copies + images.other
        images_per_call = max(1, min(settings.codes.batch_size, rows))
        batch = to_float(batch[:1].expand(images_per_call, -1, -1, -1), self.device)

        def encode() -> None:
            with torch.inference_mode():
                objective.network.eval().encode(batch)

        return {"vqvae": training_s, "codes": self._repeat(encode) * rows / images_per_call / self.workers}

    def prior(self, level: str, images: Workload) -> dict[str, float]:
        """Measure training and drawing codes; return the seconds of the prior and its part of the stage sample."""
        config = self.settings.priors[level].train
        network = self._build_prior(level)
        codes = self._random_codes(self._share(config), upto=level)
        labels = torch.zeros(self._share(config), dtype=torch.int64) if self.classes else None
        objective = PriorObjective(network, level)
        copies = {name: grid.to(torch.uint16) for name, grid in codes.items()}
        training_s = self._training(
            objective, CodeBatch(copies, labels), config, (min(images.train, config.evaluate_images), images.other)
        )
        return {f"prior_{level}": training_s, "sample": self._sampling(network, level)}

    def _training(self, objective: Objective, batch: Any, config: TrainConfig, evaluated: tuple[int, ...]) -> float:
        """Return the seconds of a training with its evaluations on so many images per split."""
        objective.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        model = TrainableModel(objective.network, config)

        def train() -> None:
            with autocast(config, self.device):
                result = objective.train()(batch, 0, self.dist)
            result.loss.backward()
            model.apply_gradients(learning_rate(config, 0), config.max_grad_norm)
            objective.absorb(result.sums)
            model.update_ema()

        def evaluate() -> None:
            with torch.inference_mode():
                objective.measure(objective.network.eval(), batch, self.dist)

        evaluations = math.ceil(config.steps / config.evaluate_every)
        calls = sum(math.ceil(min(count, config.evaluate_images) / config.batch_size) for count in evaluated)
        return config.steps * self._repeat(train) + evaluations * calls * self._repeat(evaluate)

    def _sampling(self, network: Prior, level: str) -> float:
        """Return the seconds to draw the codes of all samples: the last rows of one batch are measured."""
        config = self.settings.sample
        batch = min(config.batch_size, config.count)
        codes = {name: grid.to(self.device) for name, grid in self._random_codes(batch, upto=level).items()}
        prefix = codes.pop(level)
        labels = torch.zeros(batch, dtype=torch.int64, device=self.device) if self.classes else None
        sampler = Sampler(network.float(), batch_size=batch, method=config.method)
        rows = min(DRAWN_ROWS, network.height)

        def draw(rows: int = rows) -> None:
            sampler.draw(
                seed=0,
                sample_ids=torch.arange(batch),
                coarser=codes,
                labels=labels,
                prefix=prefix,
                prefix_rows=network.height - rows,
            )

        row_s = max(0.0, self._repeat(draw) - self._repeat(lambda: draw(1))) if rows > 1 else self._repeat(draw)
        parts = math.ceil(config.count / config.images_per_part)
        return row_s * network.height * math.ceil(config.count / batch) / min(self.workers, parts)

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

    def _random_codes(self, count: int, upto: str) -> dict[str, torch.Tensor]:
        """Return random codes, (count, H, W), of a level and the coarser ones."""
        codes = {}
        for name, side in self.settings.vqvae.grids(self.settings.dataset.image_size).items():
            codes[name] = torch.randint(0, self.settings.vqvae.levels[name].entries, (count, side, side))
            if name == upto:
                break
        return codes

    def _share(self, config: TrainConfig) -> int:
        return config.batch_size // self.workers

    def _repeat(self, call: Callable[[], object]) -> float:
        """Return the fastest time of a call, in seconds."""
        deadline, times = time.monotonic() + self.limit_s / 2, []
        for number in range(MAX_CALLS):
            start = time.monotonic()
            call()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            times.append(time.monotonic() - start)
            if number >= 1 and time.monotonic() > deadline:
                break
        return min(times[1:])


def measure(settings: Params, listing: Listing | None, classes: int, *, budget_s: float = BUDGET_S) -> dict[str, float]:
    """Return the seconds of each stage that can be measured, by name. `budget_s` limits all measurements.

    Without a listing of the images, the stages that process each image are left out.
    """
    splits = count_splits(listing) if listing is not None else {"train": 0, "validation": 0, "test": 0}
    images = Workload(splits["train"], splits["validation"] + splits["test"])
    seconds: dict[str, float] = {}
    if listing is not None:
        seconds |= _decoding(settings, listing)
    with _threads(settings):
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
    seconds = time.monotonic() - start
    return {"shard": seconds / decoded * len(listing.images) / settings.cluster.workers} if decoded else {}


@contextmanager
def _threads(settings: Params) -> Iterator[None]:
    """Compute with the processors of one worker."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, int(settings.cluster.cpus_per_worker)))
    try:
        yield
    finally:
        torch.set_num_threads(threads)
