"""One training step of the top prior, forward + backward, against the same network with a full attention matrix.

    python benchmarks/prior_step.py --threads 1

Eight grids of 32 x 32 codes, width 64, 16 gated blocks with attention after every fourth, dropout 0.1. The floor is
the time of the step's operations, three times those of the forward pass, at the speed of a large matrix product.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timing import Seconds, arguments, matmul_peak, measure, table
from torch import Tensor, nn

from models.config import PriorConfig
from models.cost import count_parameters, forward_flops
from models.priors import Prior, build, nll
from models.priors.attention import StrictAttention


class MaterialisedAttention(nn.Module):
    """Common implementation of the same attention: all scores, a mask, softmax, dropout, a product."""

    def __init__(self, attention: StrictAttention, length: int) -> None:
        super().__init__()
        self.attention = attention
        self.mask = torch.ones(length, length).tril(-1)[None, None]

    def forward(
        self, x: Float[Tensor, "B H W C"], code_embedding: Tensor, positions: Tensor
    ) -> Float[Tensor, "B H W C"]:
        """Attend over earlier positions."""
        inner = self.attention
        queries = inner.query(inner.query_block(x + inner.query_position(positions)))
        features = inner.key_block(x + inner.code_projection(code_embedding) + inner.key_position(positions))
        key_value = inner.key_value(features)
        queries, keys, values = (inner.split(grid.flatten(1, 2)) for grid in (queries, *key_value.chunk(2, -1)))
        scores = queries @ keys.transpose(2, 3) * queries.shape[-1] ** -0.5
        weights = (
            scores.masked_fill(self.mask == 0, -1e4).softmax(-1) * self.mask
        )  # the first position attends to nothing
        mixed = F.dropout(weights, inner.dropout, self.training) @ values
        return inner.merge(x, mixed.transpose(1, 2).reshape(x.shape))


def top(side: int = 32, materialised: bool = False) -> Prior:
    """Build the top prior of the benchmark."""
    config = PriorConfig("pixelsnail", channels=64, residual_channels=64, layers=16, output_layers=0)
    prior = build(config, entries=512, grid=(side, side), coarser={}, classes=0)
    if materialised:
        prior.attentions = nn.ModuleList(MaterialisedAttention(attention, side**2) for attention in prior.attentions)
    return prior


def main() -> None:
    """Time both implementations."""
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
    table(
        f"top prior step, 32 x 32, batch {options.batch}, {count_parameters(ours):,} parameters", seconds, ours="ours"
    )


if __name__ == "__main__":
    main()
