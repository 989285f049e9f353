"""Seconds to draw codes: with caches, by running the network on the rows so far, and on the whole grid.

    python benchmarks/sampling.py --threads 1
    python benchmarks/sampling.py --threads 1 --curve

The priors are the top prior of `prior_step.py` and a bottom prior of 64 x 64 codes conditioned on 32 x 32 coarser
codes, both of width 64. The cached sampler draws whole grids. The other two would take hours: the time of single
positions, for the rows so far at four heights, is multiplied by the number of positions. The floor is the time of the
matrix products of one position, multiplied likewise. The caches' products of whole rows can be faster than it.
"""

import statistics

import torch
from prior_step import top
from timing import Seconds, arguments, measure, table
from torch import Tensor, nn

from models.config import PriorConfig
from models.priors import Grid, Prior, build
from models.priors.layers import RasterConv
from models.sampling import draw


def bottom(side: int = 64) -> Prior:
    """Build a two-stack prior without attention, conditioned on one coarser level."""
    config = PriorConfig(
        "pixelcnn",
        channels=64,
        residual_channels=64,
        layers=16,
        attention_layers=0,
        output_layers=0,
        condition_layers=4,
    )
    coarser = {"top": Grid(512, side // 2, side // 2)}
    return build(config, entries=512, grid=(side, side), coarser=coarser, classes=0)


def conditions(prior: Prior, batch: int) -> dict[str, Tensor]:
    """Return random codes of the coarser levels."""
    return {name: torch.randint(0, 512, (batch, grid.height, grid.width)) for name, grid in prior.coarser.items()}


def products(prior: Prior, batch: int) -> list[tuple[Tensor, Tensor]]:
    """Return the operands of one position's matrix products: of every layer, and of attention over half the grid."""
    pairs = []
    for name, module in prior.named_modules():
        if isinstance(module, RasterConv):
            weight = module.weight.detach().flatten(1).t().contiguous()
        elif isinstance(module, nn.Linear) and module.in_features > 2 and not name.startswith("conditioning"):
            weight = module.weight.detach().t().contiguous()
        else:
            continue
        pairs.append((torch.randn(batch, weight.shape[0]), weight))
    half = prior.height * prior.width // 2
    for attention in prior.attentions:
        width = prior.embedding.embedding_dim // attention.heads
        heads = batch * attention.heads
        pairs.append((torch.randn(heads, 1, width), torch.randn(heads, width, half)))
        pairs.append((torch.randn(heads, width, half), torch.randn(heads, half, 1)))
    return pairs


def scaled(seconds: Seconds, factor: float) -> Seconds:
    """Multiply a time."""
    return Seconds(seconds.wall * factor, seconds.processor * factor)


@torch.inference_mode()
def compare(title: str, prior: Prior, batch: int, rounds: int) -> None:
    """Time the cached sampler and, extrapolated from single positions, the others."""
    prior.eval()
    positions = prior.height * prior.width
    coarser = conditions(prior, batch)
    condition, codes = prior.condition(coarser), torch.randint(0, 512, (batch, prior.height, prior.width))
    pairs = products(prior, batch)

    def cropped(rows: int) -> None:
        prior.score(codes[:, :rows], None if condition is None else condition[:, :rows], None)

    heights = [prior.height * eighths // 8 for eighths in (1, 3, 5, 7)]
    measured = measure({"ours": lambda: draw(prior, seed=0, sample_ids=torch.arange(batch), coarser=coarser)}, rounds)
    ours = measured["ours"]
    floor = measure({"floor": lambda: [torch.matmul(*pair) for pair in pairs]}, 100)["floor"]
    cropped_seconds = measure({str(rows): lambda rows=rows: cropped(rows) for rows in heights}, min(rounds, 3))
    naive = measure({"naive": lambda: prior(codes, coarser)}, min(rounds, 3))["naive"]
    mean = Seconds(*map(statistics.fmean, zip(*cropped_seconds.values(), strict=True)))
    seconds = {
        "ours: whole grids, measured": ours,
        "network on the rows so far, extrapolated": scaled(mean, positions),
        "network on the whole grid, extrapolated": scaled(naive, positions),
        "floor: products of a position, extrapolated": scaled(floor, positions),
    }
    table(f"{title}, batch {batch}", seconds, ours="ours: whole grids, measured")


def curve(rounds: int) -> None:
    """Print seconds per image, and the floor, by batch size and grid."""
    print(f"\nseconds of processor time per image, cached  ({torch.get_num_threads()} threads)")
    print(f"  {'':22}{'batch':>7}{'ours':>10}{'floor':>10}{'ours / floor':>14}")
    for name, build_prior in (("top", top), ("bottom", bottom)):
        for side in (16, 32, 64):
            prior = build_prior(side=side).eval()
            for batch in (1, 8, 32):
                coarser, pairs = conditions(prior, batch), products(prior, batch)
                sample_ids = torch.arange(batch)
                with torch.inference_mode():
                    ours = measure(
                        {"": lambda p=prior, i=sample_ids, c=coarser: draw(p, seed=0, sample_ids=i, coarser=c)}, rounds
                    )[""]
                    floor = measure({"": lambda pairs=pairs: [torch.matmul(*pair) for pair in pairs]}, 100)[""]
                per_image = ours.processor / batch, floor.processor * side**2 / batch
                print(
                    f"  {f'{name} {side} x {side}':22}{batch:7}{per_image[0]:10.3f}{per_image[1]:10.3f}"
                    f"{per_image[0] / per_image[1]:14.2f}"
                )


def main() -> None:
    """Time one batch of each prior, or several batch sizes and grids."""
    parser = arguments(__doc__)
    parser.add_argument("--batch", type=int, default=8, help="grids drawn at once")
    parser.add_argument("--curve", action="store_true", help="several batch sizes and grids instead")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.curve:
        curve(min(options.rounds, 2))
        return
    compare("top, 32 x 32, with attention", top(), options.batch, min(options.rounds, 3))
    compare("bottom, 64 x 64, conditioned on 32 x 32", bottom(), options.batch, min(options.rounds, 3))


if __name__ == "__main__":
    main()
