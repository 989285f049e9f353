"""One training step of a prior, forward + backward, against the time of its arithmetic at the peak, part by part.

    python benchmarks/prior_step.py --threads 1

The priors are those of the demo, 8 x 8 and 16 x 16 codes, and a top prior of 32 x 32 codes: width 64, 20 gated blocks
with attention of 8 heads after every fifth, dropout 0.1. The last is also compared with the same network with a full
attention matrix. The floor is the time of a step's products and convolutions at the speed of a large matrix product;
attention counts as seven products, two forward and five backward, of the visible half of the matrix.
"""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from jaxtyping import Float
from timing import arguments, matmul_peak, measure, table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from models.config import PriorConfig
from models.cost import count_parameters
from models.priors import Grid, Prior, build, nll
from models.priors.attention import StrictAttention

# Parts of a step by words in the names of their operations, the first that fits. The rest copies, adds and multiplies.
PARTS = {
    "attention": ("scaled_dot_product",),
    "convolutions": ("convolution",),
    "linear layers": ("aten::mm", "aten::addmm", "aten::bmm", "aten.mm", "aten.addmm", "aten.bmm"),
    "activations and gates": ("elu", "glu", "sigmoid", "tanh"),
    "random numbers": ("random_", "bernoulli_"),
    "loss": ("log_softmax", "nll_loss"),
}
REST = "copies, sums, rest"


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


def top(materialised: bool = False) -> Prior:
    """Build the top prior of 32 x 32 codes."""
    config = PriorConfig("pixelsnail", channels=64, residual_channels=64, layers=20, output_layers=0)
    prior = build(config, entries=512, grid=(32, 32), coarser={}, classes=0)
    if materialised:
        prior.attentions = nn.ModuleList(  # type: ignore[assignment]
            MaterialisedAttention(attention, 32**2) for attention in prior.attentions
        )
    return prior


def demo(level: str) -> Prior:
    """Build a prior of the demo: the networks of conf/prior, the grids of conf/experiment/emoji32.yaml."""
    file = Path(__file__).parents[1] / "conf" / "prior" / {"top": "pixelsnail.yaml", "bottom": "pixelcnn.yaml"}[level]
    config = PriorConfig(**yaml.safe_load(file.read_text())["network"])
    if level == "top":
        return build(config, entries=64, grid=(8, 8), coarser={}, classes=9)
    return build(config, entries=256, grid=(16, 16), coarser={"top": Grid(64, 8, 8)}, classes=9)


def step_of(prior: Prior, batch: int) -> Callable[[], None]:
    """Return a training step without the optimizer's, on random codes."""
    codes = torch.randint(0, prior.entries, (batch, prior.height, prior.width))
    coarser = {
        name: torch.randint(0, grid.entries, (batch, grid.height, grid.width)) for name, grid in prior.coarser.items()
    }
    labels = torch.randint(0, prior.classes, (batch,)) if prior.classes else None

    def step() -> None:
        nll(prior(codes, coarser, labels), codes).mean().backward()
        prior.zero_grad()

    return step


def part_of(operation: str) -> str:
    """Return the part that an operation belongs to."""
    return next((part for part, words in PARTS.items() if any(word in operation for word in words)), REST)


def print_parts(prior: Prior, step: Callable[[], None], batch: int, seconds: float) -> None:
    """Print the time of each part of a step of `seconds` by the profiler's shares, and its floor."""
    flop_per_second = matmul_peak()
    with FlopCounterMode(display=False) as counter:
        step()
    floors: defaultdict[str, float] = defaultdict(float)
    for operation, flops in counter.get_flop_counts()["Global"].items():
        floors[part_of(str(operation))] += flops / flop_per_second
    # The counter does not know the CPU's kernel of attention.
    attention_flop = 7 * batch * (prior.height * prior.width) ** 2 * prior.head.in_features * len(prior.attentions)
    floors["attention"] = attention_flop / flop_per_second
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(3):
            step()
    shares: defaultdict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        shares[part_of(event.key)] += event.self_cpu_time_total
    print(f"  {'part':44}{'ms':>11}{'floor ms':>15}{'x floor':>9}")
    for part in (*PARTS, REST):
        part_seconds = seconds * shares[part] / sum(shares.values())
        ratio = f"{part_seconds / floors[part]:9.2f}" if floors[part] else ""
        print(f"  {part:44}{part_seconds * 1e3:11.1f}{floors[part] * 1e3:15.1f}{ratio}")
    floor = sum(floors.values())
    print(f"  {'step':44}{seconds * 1e3:11.1f}{floor * 1e3:15.1f}{seconds / floor:9.2f}")


def main() -> None:
    """Time the priors, and the attention of the largest one against a common implementation."""
    parser = arguments(__doc__)
    parser.add_argument("--batch", type=int, default=8, help="grids per step of 32 x 32; the demo's priors have 16")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    for level in ("top", "bottom"):
        prior = demo(level)
        step = step_of(prior, 16)  # of each of two workers
        seconds = measure({"step": step}, options.rounds)["step"].processor
        print(f"\n{level} prior of the demo, batch 16, {count_parameters(prior):,} parameters")
        print_parts(prior, step, 16, seconds)
    ours, materialised = top(), top(materialised=True)
    steps = {"ours": step_of(ours, options.batch), "materialised": step_of(materialised, options.batch)}
    times = measure(steps, options.rounds)
    table(f"top prior step, 32 x 32, batch {options.batch}, {count_parameters(ours):,} parameters", times, ours="ours")
    print_parts(ours, steps["ours"], options.batch, times["ours"].processor)


if __name__ == "__main__":
    main()
