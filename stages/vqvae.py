"""Train the hierarchical VQ-VAE.

reads   shards   image shards                       formats/shards.py
writes  out      the trained VQ-VAE                 formats/model_file.py
        metrics  its last measurements              formats/curves.py
        plots    its curves                         formats/curves.py
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from models.config import VQVAEConfig
from models.quantizer import CodebookSums, Share, perplexity
from models.vqvae import VQVAE
from stages.config import AugmentConfig, TrainConfig
from stages.errors import UserError
from stages.formats import curves, model_file
from stages.formats.shards import ImageSet, Shards, open_shards
from stages.images.augment import augment as augmented
from stages.images.contact_sheet import contact_sheet, to_uint8
from stages.images.tensors import to_float
from stages.runtime.context import StageContext
from stages.training.checkpoint import Checkpoints
from stages.training.loop import Data, MetricSums, Objective, Step, Worker, train
from stages.training.ray_train import train_or_load
from stages.training.sampler import GlobalBatchSampler, SampleRef, ShuffledStream

SHOWN = 16  # images in the picture of reconstructions


def run(
    shards: Path,
    out: Path,
    metrics: Path,
    plots: Path,
    *,
    vqvae: VQVAEConfig,
    augment: AugmentConfig,
    train_vqvae: TrainConfig,
    seed: int,
    context: StageContext,
) -> None:
    """Train on the shards' training images; measure on their validation images."""
    images = open_shards(shards)
    images.verify()
    try:
        grids = vqvae.grids(images.image_size)
    except ValueError as error:
        raise UserError(
            f"These shards are of another image size than vqvae.levels are for: {error}.",
            where=shards,
            fix="Run: vqvae2 run --stage shard",
            code=4,
        ) from error
    arguments = {
        "shards": shards.absolute(),
        "vqvae": vqvae,
        "augment": augment,
        "train_vqvae": train_vqvae,
        "seed": seed,
    }
    network = VQVAE(vqvae)
    history = train_or_load(train_worker, arguments, train_vqvae, network=network, context=context)
    meta = {
        "network": model_file.network_meta(vqvae),
        "image_size": images.image_size,
        "grids": grids,
        "classes": list(images.classes),
        "shards": images.digest,
        # How an image becomes one that this model knows.
        "images": {
            name: images.artifact.meta["settings"][name] for name in ("resize_mode", "background", "max_pixels")
        },
    }
    drawn = draw(network.eval(), _shown(images))
    model_file.write(out, "vqvae", network.state_dict(), meta, history=history, pictures=drawn)
    curves.write_metrics(metrics, curves.last(history))
    curves.write_plot(plots, history)


def train_worker(
    *,
    worker: Worker,
    context: StageContext,
    shards: Path,
    vqvae: VQVAEConfig,
    augment: AugmentConfig,
    train_vqvae: TrainConfig,
    seed: int,
) -> None:
    """Be one of the workers that train together."""
    images = open_shards(shards)
    torch.manual_seed(seed)
    objective = Reconstruct(VQVAE(vqvae), _shown(images), train_vqvae.batch_size, seed)
    checkpoints = Checkpoints.of(context, train_vqvae.keep_checkpoints)
    data = _data(images, augment, train_vqvae, seed, worker, context.cluster.loader_workers)
    train(objective, data, train_vqvae, seed=seed, worker=worker, checkpoints=checkpoints, reporter=context.reporter)


class Reconstruct(Objective):
    """Reconstruct images, and let the codebooks follow the encoder."""

    network: VQVAE
    same_rng_on_all_workers = True  # which images lose levels

    def __init__(self, network: VQVAE, shown: np.ndarray, batch_size: int, seed: int):
        super().__init__()
        self.network, self.shown, self.batch_size, self.seed = network, shown, batch_size, seed

    def zeros(self) -> MetricSums:
        usage = {f"usage/{name}": torch.zeros(level.entries) for name, level in self.network.config.levels.items()}
        return {"values": torch.zeros(1), "squared": torch.zeros(1), "commitment": torch.zeros(1), **usage}

    def forward(self, batch: Tensor, step: int, worker: Worker) -> Step:
        images = to_float(batch, worker.device)
        share = Share(self.seed, step, worker.rank * len(images), self.batch_size)
        output = self.network(images, share)
        loss = self.network.objective(output, images)
        sums = [tensor for level in output.levels.values() for tensor in level.sums]
        # Cloned: the loop adds up the sums over workers in place, and later these totals once more.
        usage = {f"usage/{name}": level.sums.counts.clone() for name, level in output.levels.items()}
        return Step(loss.total, sums, _totals(images, loss.reconstruction, loss.commitment) | usage)

    def absorb(self, sums: list[Tensor]) -> None:
        names, width = self.network.config.levels, len(CodebookSums._fields)
        parts = (CodebookSums(*sums[start : start + width]) for start in range(0, len(sums), width))
        self.network.absorb(dict(zip(names, parts, strict=True)))

    def measure(self, network: nn.Module, batch: Tensor, worker: Worker) -> MetricSums:
        images = to_float(batch, worker.device)
        output = network(images)
        loss = self.network.objective(output, images)
        usage = {f"usage/{name}": level.sums.counts for name, level in output.levels.items()}
        return _totals(images, loss.reconstruction, loss.commitment) | usage

    def summarize(self, totals: MetricSums) -> dict[str, float]:
        values, squared, commitment = (totals[name].item() for name in ("values", "squared", "commitment"))
        mse = squared / values
        spread = {
            f"perplexity_{name}": perplexity(totals[f"usage/{name}"]) if totals[f"usage/{name}"].any() else 0.0
            for name in self.network.config.levels
        }
        # Pixels lie in [-1, 1]: their range is 2. An endless error is the loop's to tell, not the logarithm's.
        psnr = 10 * math.log10(4 / max(mse, 1e-12)) if math.isfinite(mse) else math.nan
        return {"mse": mse, "psnr": psnr, "commitment": commitment / values, **spread}

    def pictures(self, network: nn.Module) -> dict[str, bytes]:
        return draw(network, self.shown)


def draw(network: nn.Module, images: np.ndarray) -> dict[str, bytes]:
    """Draw images (N, H, W, 3) above their reconstructions from one level, two, and so on to all."""
    assert isinstance(network, VQVAE)
    device = next(network.parameters()).device
    with torch.inference_mode():
        batch = to_float(torch.from_numpy(images), device)
        if network.config.quantizer.mode == "none":  # there are no codes to decode
            rows = [network(batch).reconstruction]
        else:
            codes = network.encode(batch)
            names = list(codes)
            rows = [network.decode({name: codes[name] for name in names[:n]}) for n in range(1, len(names) + 1)]
    shown = np.concatenate([images, *(to_uint8(row.float().cpu().numpy()) for row in rows)])
    return {"reconstructions": contact_sheet(shown, columns=len(images))}


class TrainingImages(Dataset[Tensor]):
    """Training images by their place in the stream, augmented as that place decides."""

    def __init__(self, images: ImageSet, config: AugmentConfig, seed: int):
        self.images, self.config, self.seed = images, config, seed

    def __getitem__(self, pick: SampleRef) -> Tensor:
        image = augmented(self.images.read(pick.image), self.config, self.seed, pick.position)
        return torch.from_numpy(np.array(image))  # a copy of its own: a flipped view cannot become a tensor


class ErrorCapturingDataset(Dataset[Tensor | UserError]):
    """Images, or why one cannot be read: an error raised in a loader's process would arrive as a traceback."""

    def __init__(self, images: Dataset[Tensor]):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]  # where the loader asks, there is one

    def __getitem__(self, place: Any) -> Tensor | UserError:
        try:
            return self.images[place]
        except UserError as error:
            return error


def load_batches(images: Dataset[Tensor], **how: Any) -> Iterator[Tensor]:
    """Read images batch by batch, as DataLoader is told; raise what kept one from being read."""
    for batch in DataLoader(ErrorCapturingDataset(images), collate_fn=_collated, **how):
        if isinstance(batch, UserError):
            raise batch
        yield batch


def _collated(images: list[Tensor | UserError]) -> Tensor | UserError:
    wrong = next((image for image in images if isinstance(image, UserError)), None)
    return wrong or default_collate(images)


class PlainImages(Dataset[Tensor]):
    """Images as they are, by their number."""

    def __init__(self, images: ImageSet, numbers: range):
        self.images, self.numbers = images, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> Tensor:
        return torch.from_numpy(np.array(self.images.read(self.numbers[place])))


def _data(
    images: Shards, augment: AugmentConfig, config: TrainConfig, seed: int, worker: Worker, loader_workers: int
) -> Data:
    order = ShuffledStream(len(images.split("train")), seed)
    training = TrainingImages(images.split("train"), augment, seed)

    def steps(start: int) -> Iterator[Tensor]:
        batches = GlobalBatchSampler(
            order, config.batch_size, start=start, stop=config.steps, rank=worker.rank, workers=worker.count
        )
        return load_batches(training, batch_sampler=batches, num_workers=loader_workers)

    def held_out(split: ImageSet) -> Iterator[Tensor]:
        numbers = range(worker.rank, min(len(split), config.evaluate_images), worker.count)
        return load_batches(PlainImages(split, numbers), batch_size=config.batch_size, num_workers=loader_workers)

    validation = images.split("validation")
    return Data(steps, {"validation": lambda: held_out(validation)} if len(validation) else {})


def _shown(images: Shards) -> np.ndarray:
    split = images.split("validation") if len(images.split("validation")) else images.split("train")
    return np.stack([split.read(number) for number in range(min(SHOWN, len(split)))])


def _totals(images: Tensor, reconstruction: Tensor, commitment: Tensor) -> MetricSums:
    values = torch.full((1,), float(images.numel()), device=images.device)
    return {"values": values, "squared": reconstruction.detach() * values, "commitment": commitment.detach() * values}
