"""Training step and encoding of a VQ-VAE: images per second, also with the usual quantizer, and fraction of the peak.

    python benchmarks/vqvae.py --threads 1
    python benchmarks/vqvae.py --sizes 64 --compile

The model is the paper's, with two levels. The alternative is the same model with the one-hot quantizer of
`quantizer.py`. The bound is the rate at which the model's operations would run at the speed of a large matrix product
of the same precision. Rates are per second of processor time, summed over threads. Operations are counted on the meta
device; a training step counts as three forward passes.
"""

import itertools

import torch
from quantizer import OneHotQuantizer
from timing import arguments, matmul_peak, measure
from torch import Tensor, nn

from models.config import LevelConfig, VQVAEConfig
from models.cost import forward_flops
from models.quantizer import BatchSlice, CodebookSums, Quantized
from models.vqvae import VQVAE

CONFIG = VQVAEConfig({"top": LevelConfig(stride=8), "bottom": LevelConfig(stride=4)})
BATCH = {64: 16, 128: 4, 256: 1}


class Usual(nn.Module):
    """Usual quantizer with our interface. In training it updates its codebook in `forward`."""

    def __init__(self, entries: int, dim: int) -> None:
        super().__init__()
        self.inner = OneHotQuantizer(entries, dim)

    def forward(self, latents: Tensor, batch_slice: BatchSlice | None = None) -> Quantized:
        """Quantize and, in training, update the codebook."""
        with torch.autocast("cpu", enabled=False):
            quantized, commitment, codes = self.inner(latents.float())
        zero = torch.zeros(())
        return Quantized(quantized, codes, commitment, zero, CodebookSums(zero, zero, zero))

    def absorb(self, sums: CodebookSums) -> None:
        """Do nothing: `forward` has updated the codebook."""


def forward_cost(size: int) -> dict[str, int]:
    """Count the operations per image of a training step and of encoding."""
    with torch.device("meta"):
        vqvae, image = VQVAE(CONFIG), torch.empty(1, 3, size, size)
    return {"train": 3 * forward_flops(lambda: vqvae(image)), "encode": forward_flops(lambda: vqvae.encode(image))}


def timed_calls(size: int, dtype: torch.dtype, layout: torch.memory_format, compiled: bool, usual: bool) -> dict:
    """Build a model and return its two calls to time."""
    torch.compiler.reset()  # it stops compiling a function after too many shapes
    torch.manual_seed(0)
    vqvae = VQVAE(CONFIG)
    if usual:
        for name, level in CONFIG.levels.items():
            vqvae.levels[f"level_{name}"].quantizer = Usual(level.entries, level.dim)
    vqvae = vqvae.to(memory_format=layout)  # type: ignore[call-overload]
    images = (torch.rand(BATCH[size], 3, size, size) * 2 - 1).to(memory_format=layout)
    optimizer = torch.optim.Adam(vqvae.parameters(), lr=3e-4)
    forward = torch.compile(vqvae) if compiled else vqvae
    steps = itertools.count()

    def train() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            output = forward(images, BatchSlice(seed=0, step=next(steps), start=0, total=len(images)))
        optimizer.zero_grad()
        vqvae.objective(output, images).total.backward()
        optimizer.step()
        vqvae.absorb({name: level.sums for name, level in output.levels.items()})

    def encode() -> None:
        with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            vqvae.encode(images)

    return {"train": train, "encode": encode}


def main() -> None:
    """Print one line per size, precision and memory layout."""
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=list(BATCH), choices=list(BATCH))
    parser.add_argument("--compile", action="store_true", help="compile the training step's forward")
    parser.set_defaults(rounds=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    print(f"{options.threads} threads, torch {torch.__version__}, compiled: {options.compile}")
    print(
        f"{'pixels':>6} {'batch':>5} {'dtype':8} {'layout':17} {'call':6}  images/s: {'ours':>8} {'usual':>8}", end=""
    )
    print(f" {'ratio':>6} {'bound':>8} fraction")
    for dtype in (torch.float32, torch.bfloat16):
        peak = matmul_peak(dtype)
        for size in options.sizes:
            cost = forward_cost(size)
            for layout in (torch.contiguous_format, torch.channels_last):
                ours = timed_calls(size, dtype, layout, options.compile, usual=False)
                usual = timed_calls(size, dtype, layout, options.compile, usual=True)
                for name in ours:
                    # The first two calls compile, and both networks share the compiler's cache.
                    warm_up = 4 if options.compile else 1
                    seconds = measure({"ours": ours[name], "usual": usual[name]}, options.rounds, warm_up)
                    rate, other = (BATCH[size] / seconds[model].processor for model in ("ours", "usual"))
                    print(
                        f"{size:6} {BATCH[size]:5} {str(dtype)[6:]:8} {str(layout)[6:]:17} {name:6}            "
                        f"{rate:8.1f} {other:8.1f} {rate / other:6.2f} {peak / cost[name]:8.1f} "
                        f"{rate * cost[name] / peak:5.0%}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
