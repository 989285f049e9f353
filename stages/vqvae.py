"""Train the hierarchical VQ-VAE.

reads   shards   image shards                       formats/shards.py
writes  out      the trained VQ-VAE                 formats/model_file.py
        metrics  PSNR and perplexity                formats/curves.py
        plots    curves, as CSV                     formats/curves.py

B images per rank and step, H x W pixels, K codebook entries.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.config import VQVAEConfig
from models.quantizer import BatchSlice, CodebookSums, perplexity
from models.vqvae import VQVAE
from stages.config import AugmentConfig, TrainConfig
from stages.errors import UserError
from stages.formats import curves, model_file
from stages.formats.shards import Shards, open_shards
from stages.images.contact_sheet import contact_sheet
from stages.images.tensors import to_float, to_uint8
from stages.metrics import distortion
from stages.metrics.threads import one_thread
from stages.runtime.context import StageContext
from stages.runtime.verification import verify_once
from stages.training.checkpoint import Checkpoints
from stages.training.distributed import DistributedContext
from stages.training.image_batches import image_data
from stages.training.loop import TrainingLoop
from stages.training.objective import MetricSums, Objective, StepResult
from stages.training.ray_train import train_or_load

PREVIEW_IMAGES = 16  # columns of the contact sheet of reconstructions


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
    """Train on the training images of the shards and evaluate on the validation images.

    Raises UserError if the shards are damaged, if their image size does not fit the levels, or if training fails.
    """
    images = open_shards(shards)
    verify_once(images.artifact)
    try:
        grids = vqvae.grids(images.image_size)
    except ValueError as error:
        raise UserError(
            f"vqvae.levels do not fit the image size of these shards: {error}.",
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
    settings = images.artifact.meta["settings"]
    meta = {
        "network": model_file.network_meta(vqvae),
        "image_size": images.image_size,
        "grids": grids,
        "classes": list(images.classes),
        "shards": images.digest,
        # How image files were converted to the images that this model was trained on.
        "images": {name: settings[name] for name in ("resize_mode", "background", "max_pixels")},
    }
    with one_thread():
        previews = draw_reconstructions(network.eval(), preview_images(images))
    model_file.write(out, "vqvae", network.state_dict(), meta, history=history, images=previews)
    write_metrics_and_plots(metrics, plots, history, list(vqvae.levels))


def write_metrics_and_plots(metrics: Path, plots: Path, history: list[dict[str, Any]], levels: list[str]) -> None:
    """Write the last PSNR and perplexities of the validation images (else of the training images), and all curves."""
    values = curves.last(history)
    values_of_split = values.get("validation", values["train"])
    perplexities = {level: f"perplexity_{level}" for level in levels}
    curves.write_metrics(metrics, {name: values_of_split[name] for name in ("psnr", *perplexities.values())})
    training_columns = {"mse": "mse", "psnr": "psnr", "commitment": "commitment"}
    curves.write_curves_plot(plots / "training.csv", history, training_columns)
    rows = [row for level, name in perplexities.items() for row in curves.curve_points(history, [name], level)]
    curves.write_plot(plots / "perplexity.csv", ["step", "series", "perplexity"], rows)


def train_worker(
    *,
    dist: DistributedContext,
    context: StageContext,
    shards: Path,
    vqvae: VQVAEConfig,
    augment: AugmentConfig,
    train_vqvae: TrainConfig,
    seed: int,
) -> None:
    """Train in one process of `dist.world_size`."""
    images = open_shards(shards)
    torch.manual_seed(seed)  # every rank initializes the same weights
    objective = VQVAEObjective(VQVAE(vqvae), preview_images(images))
    checkpoints = Checkpoints.for_stage(context, train_vqvae.keep_checkpoints)
    loader_workers = context.cluster.loader_workers
    data = image_data(images, augment, train_vqvae, seed=seed, dist=dist, loader_workers=loader_workers)
    TrainingLoop(
        objective, data, train_vqvae, seed=seed, dist=dist, checkpoints=checkpoints, reporter=context.reporter
    ).run()


class VQVAEObjective(Objective):
    """Reconstruction and commitment loss of a VQ-VAE; its codebooks learn from sums over the global batch."""

    network: VQVAE
    same_rng_on_all_workers = True  # level dropout draws for the whole global batch

    def __init__(self, network: VQVAE, previewed: np.ndarray):
        super().__init__()
        self.network, self.previewed = network, previewed

    def zero_metrics(self) -> MetricSums:
        usage = {f"usage/{name}": torch.zeros(level.entries) for name, level in self.network.config.levels.items()}
        return {"values": torch.zeros(1), "squared": torch.zeros(1), "commitment": torch.zeros(1), **usage}

    def forward(self, batch: Tensor, batch_slice: BatchSlice, dist: DistributedContext) -> StepResult:
        images = to_float(batch, dist.device)
        output = self.network(images, batch_slice)
        loss = self.network.objective(output, images)
        sums = {name: level.sums for name, level in output.levels.items()}
        usage = {f"usage/{name}": level.sums.counts for name, level in output.levels.items()}
        return StepResult(loss.total, sums, loss_sums(images, loss.reconstruction, loss.commitment) | usage)

    def absorb(self, sums: Mapping[str, CodebookSums]) -> None:
        self.network.absorb(sums)

    def measure(self, network: nn.Module, batch: Tensor, dist: DistributedContext) -> MetricSums:
        images = to_float(batch, dist.device)
        output = network(images)
        loss = self.network.objective(output, images)
        usage = {f"usage/{name}": level.sums.counts for name, level in output.levels.items()}
        return loss_sums(images, loss.reconstruction, loss.commitment) | usage

    def summarize(self, sums: MetricSums) -> dict[str, float]:
        values, squared, commitment = (sums[name].item() for name in ("values", "squared", "commitment"))
        mse = squared / values
        perplexities = {
            f"perplexity_{name}": perplexity(sums[f"usage/{name}"]) if sums[f"usage/{name}"].any() else 0.0
            for name in self.network.config.levels
        }
        psnr = distortion.psnr(mse)
        return {"mse": mse, "psnr": psnr, "commitment": commitment / values, **perplexities}

    def previews(self, network: nn.Module) -> dict[str, bytes]:
        assert isinstance(network, VQVAE)
        return draw_reconstructions(network, self.previewed)


def loss_sums(images: Tensor, reconstruction: Tensor, commitment: Tensor) -> MetricSums:
    """Convert mean losses of a batch to sums, weighted by the number of values in `images`."""
    values = torch.full((1,), float(images.numel()), device=images.device)
    return {"values": values, "squared": reconstruction.detach() * values, "commitment": commitment.detach() * values}


def draw_reconstructions(network: VQVAE, images: np.ndarray) -> dict[str, bytes]:
    """Draw uint8 images (B, H, W, 3) in one row, and below it their reconstructions from one level, two, to all."""
    device = next(network.parameters()).device
    with torch.inference_mode():
        batch = to_float(torch.from_numpy(images), device)
        if network.config.quantizer.mode == "none":  # this mode has no codes to decode
            rows = [network(batch).reconstruction]
        else:
            rows = network.decode_prefixes(network.encode(batch))
    sheet = np.concatenate([images, *(to_uint8(row.float().cpu().numpy()) for row in rows)])
    return {"reconstructions": contact_sheet(sheet, columns=len(images))}


def preview_images(shards: Shards) -> np.ndarray:
    """Read the first validation images, or training images where there are none: uint8 (B, H, W, 3)."""
    split = shards.split("validation") if len(shards.split("validation")) else shards.split("train")
    return np.stack([split.read(index) for index in range(min(PREVIEW_IMAGES, len(split)))])
