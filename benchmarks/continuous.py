"""Samples with and without quantization: one VQ-VAE with codes and one with continuous latents, and priors over both.

    python benchmarks/continuous.py --steps 1000 --prior-steps 2000

Both VQ-VAEs have the same networks, batches and steps. Their priors have the same networks, too, except for input and
output: entries of a codebook, or latents and mixtures of Gaussians (models/priors/density.py). Prints, per model: the
MSE of validation images; the NLL of the priors, per code or per number of the normalized latents, which cannot be
compared with each other; and the distances of samples and of reconstructions to the validation images.

The author response (lines 45-46) states that the model does not work without quantization: expect better
reconstructions and worse samples.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from quality import Comparison, load
from timing import arguments
from torch import Tensor, nn

from models.config import LevelConfig, PriorConfig, QuantizerConfig, VQVAEConfig
from models.priors import Grid, build, nll
from models.priors.density import DensityPrior
from models.quantizer import BatchSlice
from models.sampling import draw
from models.vqvae import VQVAE

ENTRIES, BATCH, SIDE = 256, 64, 32
STRIDES = {"top": 8, "bottom": 4}
SIDES = {name: SIDE // stride for name, stride in STRIDES.items()}
NETWORKS = {
    "top": PriorConfig("pixelsnail", 64, 64, 6, 2, 4, 3, 0.1, 1, 0),
    "bottom": PriorConfig("pixelcnn", 64, 64, 6, 0, 1, 3, 0.1, 1, 2),
}
Grids = dict[str, Tensor]


def batches(count: int, steps: int) -> Iterator[Tensor]:
    """Yield the indices of random batches, the same for every model."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        yield torch.randint(count, (BATCH,), generator=generator)


def train_vqvae(mode: str, dim: int, images: Tensor, steps: int) -> VQVAE:
    """Train a VQ-VAE with or without quantization."""
    torch.manual_seed(0)
    levels = {name: LevelConfig(stride, 64, 32, entries=ENTRIES, dim=dim) for name, stride in STRIDES.items()}
    vqvae = VQVAE(VQVAEConfig(levels, QuantizerConfig(mode=mode)))  # type: ignore[arg-type]
    vqvae = vqvae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(vqvae.parameters(), lr=1e-3)
    for step, rows in enumerate(batches(len(images), steps)):
        output = vqvae(images[rows], BatchSlice(0, step, 0, BATCH))
        optimizer.zero_grad()
        vqvae.objective(output, images[rows]).total.backward()
        optimizer.step()
        vqvae.absorb({name: level.sums for name, level in output.levels.items()})
    return vqvae.eval()


@torch.inference_mode()
def encode(vqvae: VQVAE, images: Tensor) -> tuple[Grids, Grids, Tensor]:
    """Return codes (N, H, W) and latents (N, H, W, D) by level, and reconstructions."""
    outputs = [vqvae(batch) for batch in images.split(BATCH)]
    codes = {name: torch.cat([output.levels[name].codes for output in outputs]) for name in STRIDES}
    latents = {
        name: torch.cat([output.levels[name].latents for output in outputs]).permute(0, 2, 3, 1) for name in STRIDES
    }
    return codes, latents, torch.cat([output.reconstruction for output in outputs])


def train_prior(network: nn.Module, loss: Callable[[Tensor], Tensor], count: int, steps: int) -> None:
    """Train a prior; `loss` maps rows of the training images to their mean NLL."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for rows in batches(count, steps):
        optimizer.zero_grad()
        loss(rows).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    network.eval()


def model_codes(vqvae: VQVAE, training: Grids, validation: Grids, steps: int) -> tuple[dict[str, float], Tensor]:
    """Train priors over codes; return the NLL per code of the validation images, and samples."""
    losses: dict[str, float] = {}
    samples: Grids = {}
    for level, side in SIDES.items():
        coarser_levels = [name for name in SIDES if SIDES[name] < side]
        coarser = {name: Grid(ENTRIES, SIDES[name], SIDES[name]) for name in coarser_levels}
        prior = build(NETWORKS[level], entries=ENTRIES, grid=(side, side), coarser=coarser, classes=0)

        def loss(rows: Tensor, source: Mapping[str, Tensor] = training, prior=prior, level=level) -> Tensor:
            grids = {name: source[name][rows] for name in prior.coarser}
            return nll(prior(source[level][rows], grids), source[level][rows]).mean() / SIDES[level] ** 2

        train_prior(prior, loss, len(training[level]), steps)
        with torch.inference_mode():
            losses[level] = float(loss(torch.arange(len(validation[level])), validation))
        drawn_coarser = {name: samples[name] for name in coarser_levels}
        ids = torch.arange(len(validation[level]))
        samples[level] = draw(prior, seed=len(samples), sample_ids=ids, coarser=drawn_coarser)
    with torch.inference_mode():
        return losses, vqvae.decode(samples)


def model_latents(vqvae: VQVAE, training: Grids, validation: Grids, steps: int) -> tuple[dict[str, float], Tensor]:
    """Train priors over latents; return the NLL per number of the validation images, and samples."""
    mean = {level: grids.mean((0, 1, 2)) for level, grids in training.items()}
    deviation = {level: grids.std((0, 1, 2)).clamp(min=1e-6) for level, grids in training.items()}
    training, validation = (
        {level: (grids - mean[level]) / deviation[level] for level, grids in source.items()}
        for source in (training, validation)
    )
    losses: dict[str, float] = {}
    samples: Grids = {}
    for level, side in SIDES.items():
        dim = training[level].shape[-1]
        coarser_levels = [name for name in SIDES if SIDES[name] < side]
        coarser = {name: (dim, (SIDES[name], SIDES[name])) for name in coarser_levels}
        prior = DensityPrior(NETWORKS[level], dim=dim, grid=(side, side), coarser=coarser)

        def loss(
            rows: Tensor, source: Mapping[str, Tensor] = training, prior=prior, level=level, names=coarser_levels
        ) -> Tensor:
            grids = {name: source[name][rows] for name in names}
            return prior.nll(source[level][rows], grids).mean() / source[level][0].numel()

        train_prior(prior, loss, len(training[level]), steps)
        with torch.inference_mode():
            losses[level] = float(loss(torch.arange(len(validation[level])), validation))
        drawn_coarser = {name: samples[name] for name in coarser_levels}
        samples[level] = prior.draw(len(validation[level]), seed=len(samples), coarser=drawn_coarser)
    with torch.inference_mode():
        scaled = {level: grids * deviation[level] + mean[level] for level, grids in samples.items()}
        return losses, vqvae.decode_latents({level: grids.permute(0, 3, 1, 2) for level, grids in scaled.items()})


def main() -> None:
    """Train both models and print their results."""
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--source", type=Path, default=Path("data/fluent-emoji-64.zip"))
    parser.add_argument("--steps", type=int, default=1000, help="of each VQ-VAE")
    parser.add_argument("--prior-steps", type=int, default=2000, help="of each prior")
    parser.add_argument("--dim", type=int, default=16, help="numbers per latent vector")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    training, validation = load(options.source, SIDE)
    comparison = Comparison(validation)
    for mode, model in (("ema", model_codes), ("none", model_latents)):
        vqvae = train_vqvae(mode, options.dim, training, options.steps)
        codes, latents, _ = encode(vqvae, training)
        validation_codes, validation_latents, reconstructions = encode(vqvae, validation)
        grids = (codes, validation_codes) if mode == "ema" else (latents, validation_latents)
        losses, samples = model(vqvae, *grids, options.prior_steps)
        mse = float((reconstructions - validation).square().mean())
        nats = ", ".join(f"{level} {value:.3f}" for level, value in losses.items())
        print(f"quantizer {mode}: MSE {mse:.5f}; NLL in nats per {'code' if mode == 'ema' else 'number'}: {nats}")
        print(f"  samples          {comparison.describe(samples)}")
        print(f"  reconstructions  {comparison.describe(reconstructions)}", flush=True)


if __name__ == "__main__":
    main()
