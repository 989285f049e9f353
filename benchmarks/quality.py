"""Quality after equal processor time: our two-level VQ-VAE and one with a plain codebook, on the default images.

    python benchmarks/quality.py --seconds 1800

The plain model has the same networks, batches and optimizer, and the most common codebook: random initial entries,
moving averages that start at counts of zero, no revival. Both train on the same images in the same order, for as many
steps as the time allows. Prints, per model: steps, mean squared error on training and validation images in [-1, 1], and
each level's perplexity over the validation images.
"""

import io
import random
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from timing import arguments
from torch import Tensor

from models.config import LevelConfig, VQVAEConfig
from models.quantizer import BatchSlice, CodebookSums, Quantizer, perplexity
from models.vqvae import VQVAE

LEVELS = {
    "top": LevelConfig(stride=8, channels=64, residual_channels=32, entries=256),
    "bottom": LevelConfig(stride=4, channels=64, residual_channels=32, entries=256),
}


class PlainQuantizer(Quantizer):
    """Codebook with random initial entries and counts of zero, without revival."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__(quantizer.config, quantizer.entries, quantizer.dim, quantizer.level)
        self.codebook.normal_()
        self.vectors.copy_(self.codebook)
        self.counts.zero_()

    @torch.no_grad()
    def absorb(self, sums: CodebookSums) -> None:
        """Update entries by equation 3."""
        self.counts.lerp_(sums.counts, 1 - self.config.decay)
        self.vectors.lerp_(sums.vectors, 1 - self.config.decay)
        self.codebook.copy_(self.vectors / self._smoothed_counts()[:, None])


def plain() -> VQVAE:
    """Build our networks with the plain codebook."""
    vqvae = VQVAE(VQVAEConfig(LEVELS))
    for level in vqvae.levels.values():
        level.quantizer = PlainQuantizer(cast(Quantizer, level.quantizer))
    return vqvae


def load(source: Path, side: int = 32) -> tuple[Tensor, Tensor]:
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


def train(vqvae: VQVAE, images: Tensor, seconds: float, batch_size: int = 64) -> int:
    """Train for `seconds` of processor time and return the number of steps."""
    optimizer = torch.optim.Adam(vqvae.parameters(), lr=3e-4)
    order = torch.Generator().manual_seed(0)
    started, step = time.process_time(), 0
    while time.process_time() - started < seconds:
        batch = images[torch.randint(len(images), (batch_size,), generator=order)]
        output = vqvae(batch.contiguous(memory_format=torch.channels_last), BatchSlice(0, step, 0, batch_size))
        optimizer.zero_grad()
        vqvae.objective(output, batch).total.backward()
        optimizer.step()
        vqvae.absorb({name: level.sums for name, level in output.levels.items()})
        step += 1
    return step


@torch.inference_mode()
def validate(vqvae: VQVAE, images: Tensor) -> tuple[float, dict[str, float]]:
    """Return the mean squared error and each level's perplexity."""
    squares, counts = 0.0, dict.fromkeys(LEVELS, torch.zeros(()))
    for batch in images.split(64):
        output = vqvae(batch)
        squares += float((output.reconstruction - batch).square().sum())
        counts = {name: counts[name] + level.sums.counts for name, level in output.levels.items()}
    return squares / images.numel(), {name: perplexity(level_counts) for name, level_counts in counts.items()}


def main() -> None:
    """Train both models and print their results."""
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=1800.0, help="of processor time, for each model")
    parser.add_argument("--source", type=Path, default=Path("data/fluent-emoji-64.zip"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    training, validation = load(options.source)
    print(f"{len(training)} training and {len(validation)} validation images of 32 x 32, seed {options.seed}")
    builds: dict[str, Callable[[], VQVAE]] = {"ours": lambda: VQVAE(VQVAEConfig(LEVELS)), "plain": plain}
    for name, build in builds.items():
        torch.manual_seed(options.seed)
        vqvae = build().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        steps = train(vqvae, training, options.seconds)
        error, uses = validate(vqvae, validation)
        training_error, _ = validate(vqvae, training[: len(validation)])
        used = ", ".join(f"{level} {value:.1f} of {LEVELS[level].entries}" for level, value in uses.items())
        print(
            f"{name:6} {steps:6} steps  MSE training {training_error:.5f} validation {error:.5f}  perplexity {used}",
            flush=True,
        )


if __name__ == "__main__":
    main()
