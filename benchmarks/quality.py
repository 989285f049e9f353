"""Quality after equal processor time: this repository's chain and a plain one, on the default images.

    python benchmarks/quality.py --seconds 600

A chain is a two-level VQ-VAE, a prior of each level, and samples. Each of the three networks trains for the given
seconds, with the settings of the demo (conf/), but without classes and shifted images. The plain chain has the same
encoders, decoders, widths and batches, and lacks what this repository adds:

    codebooks    the rule of rosinality/vq-vae-2-pytorch: random entries whose counts start at zero, no revival
    top level    no dropout of the bottom level, so nothing asks it for more than the bottom level lacks
    top prior    PixelCNN instead of PixelSNAIL
    bottom prior the top codes are embedded and upsampled without a residual stack
    training     Adam at Sonnet's constant learning rate, no dropout, no mirrored images, the last weights

An entry of a plain codebook that no vector chooses first moves away from 0 and comes back after some 1,300 steps, so
compare trainings that are longer. Prints, per chain: steps, MSE of training and validation images in [-1, 1], entries
in use and perplexity over the validation images, the priors' NLL of validation images in nats per code, which depends
on the codebook, and distances of samples to the validation images at several temperatures.

Axes: N images, H x W pixels or grid of codes, D features.
"""

import argparse
import io
import random
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from models.priors import Grid, build, nll
from models.priors.base import Prior
from models.quantizer import BatchSlice, CodebookSums, Quantizer, perplexity
from models.sampling import draw
from models.vqvae import VQVAE
from pipeline import params
from pipeline.compose import compose_params
from stages.config import EvaluateConfig, Params, PriorStageConfig, TrainConfig
from stages.images.tensors import to_uint8
from stages.metrics.features import FeatureNetwork
from stages.metrics.networks import read_networks
from stages.metrics.set_metrics import compare
from stages.training.checkpoint_state import TrainableModel
from stages.training.optimizer import learning_rate

ROOT = Path(__file__).parents[1]
PLAIN_LEARNING_RATE = 3e-4
TEMPERATURES = ((1.0, 1.0), (0.9, 0.5), (0.9, 0.01))  # of the top and of the bottom level
Grids = dict[str, Tensor]  # codes (N, H, W) by level


def demo_settings() -> Params:
    """Compose the settings of the demo from conf/."""
    return params.check(compose_params(conf=ROOT / "conf"), ROOT / "conf")


class PlainQuantizer(Quantizer):
    """Codebook with random initial entries and counts of zero, without revival."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__(quantizer.config, quantizer.entries, quantizer.dim, quantizer.level)
        self.codebook.normal_()
        self.vectors.copy_(self.codebook)
        self.counts.zero_()

    @torch.no_grad()
    def absorb(self, sums: CodebookSums) -> None:
        """Update all entries by equation 3."""
        self.counts.lerp_(sums.counts, 1 - self.config.decay)
        self.vectors.lerp_(sums.vectors, 1 - self.config.decay)
        self.codebook.copy_(self.vectors / self._smoothed_counts()[:, None])

    def _centre(self) -> Tensor:
        return torch.zeros(self.dim)  # the mean entry is undefined while all counts are zero


def plain_prior(config: PriorStageConfig) -> PriorStageConfig:
    """Return the settings of the plain prior of a level."""
    network = replace(config.network, name="pixelcnn", attention_layers=0, condition_layers=0, dropout=0.0)
    return PriorStageConfig(network, plain_training(config.train))


def plain_training(config: TrainConfig) -> TrainConfig:
    """Return the settings of plain training."""
    return replace(
        config,
        optimizer="adam",
        muon_scale=1.0,
        learning_rate=PLAIN_LEARNING_RATE,
        lr_schedule="constant",
        warmup_steps=0,
        ema_decay=0.0,
    )


def plain_settings(settings: Params) -> Params:
    """Return the settings of the plain chain."""
    return replace(
        settings,
        vqvae=replace(settings.vqvae, level_dropout=0.0),
        train_vqvae=plain_training(settings.train_vqvae),
        priors={level: plain_prior(config) for level, config in settings.priors.items()},
    )


def load(source: Path, side: int) -> tuple[Tensor, Tensor]:
    """Read the images, on white, and hold out one twelfth for validation."""
    pixels = []
    with zipfile.ZipFile(source) as archive:
        for name in sorted(archive.namelist()):
            if not name.lower().endswith((".png", ".jpg", ".jpeg", ".webp")):
                continue
            image = Image.open(io.BytesIO(archive.read(name))).convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            flat = Image.alpha_composite(white, image).convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
            pixels.append(np.asarray(flat))
    random.Random(0).shuffle(pixels)
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return images[len(images) // 12 :], images[: len(images) // 12]


class ChainTraining:
    """Training of one chain on one set of images."""

    def __init__(self, settings: Params, seconds: float, seed: int, *, plain: bool) -> None:
        self.settings = plain_settings(settings) if plain else settings
        self.seconds, self.seed, self.plain = seconds, seed, plain
        self.levels = settings.vqvae.levels

    def train(
        self,
        network: nn.Module,
        config: TrainConfig,
        count: int,
        loss: Callable[[Tensor, int], Tensor],
        after_step: Callable[[], None] = lambda: None,
    ) -> tuple[nn.Module, int]:
        """Train for the seconds of processor time; return the network to evaluate and the number of steps.

        `loss` maps the indices of a batch, of `count` images, and the step to the loss.
        """
        model = TrainableModel(network.to(memory_format=torch.channels_last), config)  # type: ignore[call-overload]
        order = torch.Generator().manual_seed(self.seed)
        started, step = time.process_time(), 0
        while (elapsed := time.process_time() - started) < self.seconds:
            loss(torch.randint(count, (config.batch_size,), generator=order), step).backward()
            schedule_step = int(elapsed / self.seconds * config.steps)
            model.apply_gradients(learning_rate(config, schedule_step), config.max_grad_norm)
            after_step()
            model.update_ema()
            step += 1
        return model.evaluation_network.eval(), step

    def train_vqvae(self, images: Tensor) -> tuple[VQVAE, int]:
        """Train the VQ-VAE on images (N, 3, H, W)."""
        torch.manual_seed(self.seed)
        vqvae, config = VQVAE(self.settings.vqvae), self.settings.train_vqvae
        if self.plain:
            for level in vqvae.levels.values():
                level.quantizer = PlainQuantizer(cast(Quantizer, level.quantizer))
        sums: dict[str, CodebookSums] = {}

        def loss(rows: Tensor, step: int) -> Tensor:
            batch = images[rows].contiguous(memory_format=torch.channels_last)
            output = vqvae(batch, BatchSlice(self.seed, step, 0, len(batch)))
            sums.update({name: level.sums for name, level in output.levels.items()})
            return vqvae.objective(output, batch).total

        trained, steps = self.train(vqvae, config, len(images), loss, lambda: vqvae.absorb(sums))
        return cast(VQVAE, trained), steps

    def train_prior(self, level: str, codes: Grids) -> tuple[Prior, int]:
        """Train the prior of a level."""
        torch.manual_seed(self.seed)
        _, height, width = codes[level].shape
        prior = build(
            self.settings.priors[level].network,
            entries=self.levels[level].entries,
            grid=(height, width),
            coarser={name: Grid(self.levels[name].entries, *codes[name].shape[1:]) for name in self.coarser(level)},
            classes=0,
        )
        trained, steps = self.train(
            prior,
            self.settings.priors[level].train,
            len(codes[level]),
            lambda rows, step: mean_nll(prior, level, codes, rows),
        )
        return cast(Prior, trained), steps

    def coarser(self, level: str) -> list[str]:
        """Name the levels before a level."""
        return list(self.levels)[: list(self.levels).index(level)]

    def draw(self, vqvae: VQVAE, priors: dict[str, Prior], temperatures: tuple[float, ...], count: int) -> Tensor:
        """Draw samples: (count, 3, H, W)."""
        codes: Grids = {}
        for (level, prior), temperature in zip(priors.items(), temperatures, strict=True):
            codes[level] = draw(
                prior,
                seed=self.seed,
                sample_ids=torch.arange(count),
                coarser={name: codes[name] for name in self.coarser(level)},
                temperature=temperature,
                batch_size=64,
            )
        with torch.inference_mode():
            return vqvae.decode(codes)

    def run(self, name: str, training: Tensor, validation: Tensor, comparison: "Comparison") -> None:
        """Train all networks, and print the results."""
        count = len(training)
        if not self.plain:
            training = torch.cat([training, training.flip(-1)])
        vqvae, steps = self.train_vqvae(training)
        codes, training_reconstructions = encode(vqvae, training)
        validation_codes, reconstructions = encode(vqvae, validation)
        training_mse = float((training_reconstructions - training)[:count].square().mean())
        mse = float((reconstructions - validation).square().mean())
        print(f"\n{name}: VQ-VAE, {steps} steps, MSE {training_mse:.5f} (training), {mse:.5f} (validation)")
        priors: dict[str, Prior] = {}
        for level, config in self.levels.items():
            counts = validation_codes[level].flatten().bincount(minlength=config.entries)
            priors[level], steps = self.train_prior(level, codes)
            with torch.inference_mode():
                loss = float(mean_nll(priors[level], level, validation_codes, torch.arange(len(validation))))
            print(
                f"  {level}: {int((counts > 0).sum())} of {config.entries} entries in use, perplexity "
                f"{perplexity(counts):.1f}; prior, {steps} steps, NLL {loss:.3f}",
                flush=True,
            )
        print(f"  reconstructions: {comparison.describe(reconstructions)}")
        for temperatures in TEMPERATURES:
            samples = self.draw(vqvae, priors, temperatures, len(validation))
            label = " and ".join(f"{temperature:g}" for temperature in temperatures)
            print(f"  samples at temperatures {label}: {comparison.describe(samples)}", flush=True)


def mean_nll(prior: Prior, level: str, codes: Grids, rows: Tensor) -> Tensor:
    """Compute the mean NLL of images in nats per code."""
    grids = {name: codes[name][rows] for name in prior.coarser}
    return nll(prior(codes[level][rows], grids), codes[level][rows]).mean() / codes[level][0].numel()


@torch.inference_mode()
def encode(vqvae: VQVAE, images: Tensor) -> tuple[Grids, Tensor]:
    """Return codes, and reconstructions (N, 3, H, W)."""
    outputs = [vqvae(batch) for batch in images.split(64)]
    codes = {name: torch.cat([output.levels[name].codes for output in outputs]) for name in outputs[0].levels}
    return codes, torch.cat([output.reconstruction for output in outputs])


class Comparison:
    """Comparison of sets of images (N, 3, H, W) with a reference set, as in the report."""

    def __init__(self, reference: Tensor) -> None:
        self.network = FeatureNetwork(read_networks(EvaluateConfig().networks)[0])
        self.reference = self.features(reference)

    def features(self, images: Tensor) -> np.ndarray:
        """Compute the features (N, D) of images."""
        return self.network(to_uint8(images.float().numpy()))

    def describe(self, images: Tensor) -> str:
        """Return KID with its standard error, Fréchet distance, precision and recall as text."""
        values = compare(self.reference, self.features(images), EvaluateConfig(), 0)
        kid, error = cast(tuple[float, float], values["kid"])
        return f"KID {kid:.4f} ± {error:.4f}, " + ", ".join(
            f"{label} {cast(float, values[name]):.4g}"
            for name, label in (("frechet", "Fréchet distance"), ("precision", "precision"), ("recall", "recall"))
        )


def main() -> None:
    """Train both chains and print their results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="of processor time, for each of six networks")
    parser.add_argument("--source", type=Path, default=ROOT / "data" / "fluent-emoji-64.zip")
    parser.add_argument("--threads", type=int, default=1, help="threads torch may use")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = demo_settings()
    side = settings.dataset.image_size
    training, validation = load(options.source, side)
    print(f"{len(training)} training and {len(validation)} validation images of {side} x {side}, seed {options.seed}")
    comparison = Comparison(validation)
    for name, plain in (("this repository", False), ("plain", True)):
        ChainTraining(settings, options.seconds, options.seed, plain=plain).run(name, training, validation, comparison)


if __name__ == "__main__":
    main()
