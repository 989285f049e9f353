"""Seconds to draw an image from a prior over pixels and from priors over codes, with caches and without.

    python benchmarks/pixels.py --threads 1

One network, the two-stack prior of `sampling.py` without its conditioning stack, draws three grids: the pixels, 256
values of each colour in raster order (H x 3W positions), and the codes of a two-level VQ-VAE at strides 8 and 4 (512
entries), the finer ones conditioned on the coarser ones. The time of the codes includes decoding by the paper's VQ-VAE.
Weights are random: the time does not depend on them.

Naive sampling runs the network on the whole grid for each position. One pass is timed, and its time is multiplied by
the number of positions. At 256 pixels nothing is drawn: positions and operations are counted. Cached sampling needs
about the operations of one pass over the grid, naive sampling those of one pass per position.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from timing import Seconds, arguments, measure
from torch import Tensor

from models.config import LevelConfig, PriorConfig, VQVAEConfig
from models.cost import count_parameters, forward_flops
from models.priors import Grid, Prior, build
from models.sampling import draw
from models.vqvae import VQVAE

MEASURED, COUNTED = (32, 64), 256  # sides of images, in pixels
COLOUR_VALUES, ENTRIES = 256, 512
STRIDES = {"top": 8, "bottom": 4}


class Priors(NamedTuple):
    """Priors that draw one image, coarse to fine."""

    by_level: Mapping[str, Prior]

    @property
    def positions(self) -> int:
        """Positions that are drawn one after another."""
        return sum(prior.height * prior.width for prior in self.by_level.values())

    def flops(self) -> tuple[int, int]:
        """Count the operations per image: of one pass over each grid, and of one pass per position."""
        passes = {level: forward_flops(partial(prior, *example(prior, 1))) for level, prior in self.by_level.items()}
        naive = sum(passes[level] * prior.height * prior.width for level, prior in self.by_level.items())
        return sum(passes.values()), naive

    def draw(self, batch: int) -> dict[str, Tensor]:
        """Draw a batch with caches."""
        grids: dict[str, Tensor] = {}
        for level, prior in self.by_level.items():
            coarser = {name: grids[name] for name in prior.coarser}
            grids[level] = draw(prior, seed=0, sample_ids=torch.arange(batch), coarser=coarser)
        return grids


def example(prior: Prior, batch: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return codes and coarser codes of a prior's shape, on its device."""
    device = prior.positions.device
    codes = torch.zeros(batch, prior.height, prior.width, dtype=torch.int64, device=device)
    coarser = {
        name: torch.zeros(batch, grid.height, grid.width, dtype=torch.int64, device=device)
        for name, grid in prior.coarser.items()
    }
    return codes, coarser


def pixel_priors(config: PriorConfig, side: int) -> Priors:
    """Build the prior over the colour values of an image in raster order."""
    grid = (side, 3 * side)
    return Priors({"pixels": build(config, entries=COLOUR_VALUES, grid=grid, coarser={}, classes=0).eval()})


def code_priors(config: PriorConfig, side: int) -> Priors:
    """Build the priors over the codes of a two-level VQ-VAE."""
    top, bottom = ((side // stride, side // stride) for stride in STRIDES.values())
    return Priors(
        {
            "top": build(config, entries=ENTRIES, grid=top, coarser={}, classes=0).eval(),
            "bottom": build(
                config, entries=ENTRIES, grid=bottom, coarser={"top": Grid(ENTRIES, *top)}, classes=0
            ).eval(),
        }
    )


@torch.inference_mode()
def compare(config: PriorConfig, side: int, batch: int, rounds: int) -> None:
    """Time both kinds of priors at one size, and print their ratios."""
    pixels, codes = pixel_priors(config, side), code_priors(config, side)
    vqvae = VQVAE(VQVAEConfig({name: LevelConfig(stride, entries=ENTRIES) for name, stride in STRIDES.items()})).eval()
    calls = {"pixels": lambda: pixels.draw(batch), "codes": lambda: vqvae.decode(codes.draw(batch))}
    cached = measure(calls, rounds)
    passes = measure(
        {
            level: lambda prior=prior: prior(*example(prior, batch))
            for priors in (pixels, codes)
            for level, prior in priors.by_level.items()
        },
        rounds,
    )
    decoding = measure({"": lambda: vqvae.decode(codes_of(codes, batch))}, rounds)[""]
    naive = {
        "pixels": naive_seconds(pixels, passes),
        "codes": Seconds(*map(sum, zip(naive_seconds(codes, passes), decoding, strict=True))),
    }
    print(f"\n{side} x {side} pixels, batch {batch}: seconds of processor time per image")
    print(f"  {'':10}{'positions':>11}{'cached':>11}{'naive, extrapolated':>22}{'naive / cached':>16}")
    for name, priors in (("pixels", pixels), ("codes", codes)):
        with_caches, without = cached[name].processor / batch, naive[name].processor / batch
        print(f"  {name:10}{priors.positions:11,}{with_caches:11.4f}{without:22.2f}{without / with_caches:16.1f}")
    ratios = [seconds["pixels"].processor / seconds["codes"].processor for seconds in (cached, naive)]
    print(f"  pixels / codes{pixels.positions / codes.positions:7.1f}{ratios[0]:11.1f}{ratios[1]:22.1f}", flush=True)


def codes_of(priors: Priors, batch: int) -> dict[str, Tensor]:
    """Return codes of every level, to decode."""
    return {level: example(prior, batch)[0] for level, prior in priors.by_level.items()}


def naive_seconds(priors: Priors, passes: Mapping[str, Seconds]) -> Seconds:
    """Multiply the time of one pass over each grid by its positions."""
    positions = {level: prior.height * prior.width for level, prior in priors.by_level.items()}
    return Seconds(
        math.fsum(passes[level].wall * count for level, count in positions.items()),
        math.fsum(passes[level].processor * count for level, count in positions.items()),
    )


def count(config: PriorConfig, side: int) -> None:
    """Print positions and operations at a size, without computing anything."""
    with torch.device("meta"):
        pixels, codes = pixel_priors(config, side), code_priors(config, side)
        flops = {"pixels": pixels.flops(), "codes": codes.flops()}
    print(f"\n{side} x {side} pixels, counted per image")
    print(f"  {'':10}{'positions':>11}{'cached, GFLOP':>16}{'naive, PFLOP':>16}")
    for name, priors in (("pixels", pixels), ("codes", codes)):
        print(f"  {name:10}{priors.positions:11,}{flops[name][0] / 1e9:16.2f}{flops[name][1] / 1e15:16.3f}")
    ratios = [flops["pixels"][index] / flops["codes"][index] for index in range(2)]
    print(f"  pixels / codes{pixels.positions / codes.positions:7.1f}{ratios[0]:16.1f}{ratios[1]:16.1f}")


def main() -> None:
    """Measure at two sizes and count at the paper's."""
    parser = arguments(__doc__)
    parser.add_argument("--batch", type=int, default=8, help="images drawn at once")
    parser.add_argument("--channels", type=int, default=64, help="width of the network")
    parser.add_argument("--layers", type=int, default=16, help="gated blocks of the network")
    parser.add_argument("--sides", type=int, nargs="*", default=MEASURED, help="sides of the drawn images, in pixels")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = PriorConfig(
        "pixelcnn",
        channels=options.channels,
        residual_channels=options.channels,
        layers=options.layers,
        attention_layers=0,
        output_layers=0,
        condition_layers=0,
    )
    parameters = count_parameters(pixel_priors(config, min(MEASURED)).by_level["pixels"])
    print(
        f"network of {options.layers} blocks, {options.channels} channels, {parameters:,} parameters; "
        f"{options.threads} threads, torch {torch.__version__}"
    )
    for side in options.sides:
        compare(config, side, options.batch, options.rounds)
    count(config, COUNTED)


if __name__ == "__main__":
    main()
