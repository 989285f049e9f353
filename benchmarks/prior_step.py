"""One training step of the top prior, forward + backward, against the same network with materialised attention.

    python benchmarks/prior_step.py --threads 1

Eight grids of 32 x 32 codes, width 64, 16 gated blocks with attention after every fourth, dropout 0.1. The floor is
the step's arithmetic, three times the forward's, at the speed of a large matrix product.
"""

import torch
from jaxtyping import Float
from timing import Seconds, arguments, matmul_peak, measure, table
from torch import Tensor, nn
from torch.nn import functional as F

from models.config import PriorConfig
from models.cost import forward_flops, parameters
from models.priors import Prior, build, nll
from models.priors.attention import StrictAttention


class MaterialisedAttention(nn.Module):
    """The same attention as it is mostly written: all scores, a mask over them, softmax, dropout, a product."""

    def __init__(self, attention: StrictAttention, length: int) -> None:
        super().__init__()
        self.attention = attention
        self.mask = torch.ones(length, length).tril(-1)[None, None]

    def forward(self, x: Float[Tensor, "B H W C"], raw: Tensor, positions: Tensor) -> Float[Tensor, "B H W C"]:
        """Mix into the features what earlier positions hold."""
        inner = self.attention
        queries = inner.query(inner.query_block(x + inner.query_position(positions)))
        seen = inner.key_value(inner.key_block(x + inner.raw(raw) + inner.key_position(positions)))
        queries, keys, values = (inner.split(part.flatten(1, 2)) for part in (queries, *seen.chunk(2, -1)))
        scores = queries @ keys.transpose(2, 3) * queries.shape[-1] ** -0.5
        weights = scores.masked_fill(self.mask == 0, -1e4).softmax(-1) * self.mask  # the first position sees nothing
        mixed = F.dropout(weights, inner.dropout, self.training) @ values
        return inner.merge(x, mixed.transpose(1, 2).reshape(x.shape))


def top(side: int = 32, materialised: bool = False) -> Prior:
    """The top prior of the benchmark."""
    config = PriorConfig("pixelsnail", channels=64, residual_channels=64, layers=16, output_layers=0)
    prior = build(config, entries=512, grid=(side, side), coarser={}, classes=0)
    if materialised:
        prior.attentions = nn.ModuleList(MaterialisedAttention(each, side**2) for each in prior.attentions)
    return prior


def main() -> None:
    """Time both."""
    parser = arguments(__doc__)
    parser.add_argument("--batch", type=int, default=8, help="grids per step")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    codes = torch.randint(0, 512, (options.batch, 32, 32))
    ours, materialised = top(), top(materialised=True)

    def step(prior: Prior) -> None:
        nll(prior(codes), codes).mean().backward()
        prior.zero_grad()

    seconds = measure({"ours": lambda: step(ours), "materialised": lambda: step(materialised)}, options.rounds)
    floor = 3 * forward_flops(lambda: ours(codes)) / matmul_peak() / options.threads
    seconds["floor: arithmetic at peak"] = Seconds(floor, floor * options.threads)
    table(f"top prior step, 32 x 32, batch {options.batch}, {parameters(ours):,} parameters", seconds, ours="ours")


if __name__ == "__main__":
    main()
