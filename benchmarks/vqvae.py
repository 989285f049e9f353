"""A VQ-VAE's training step and encoding: images per second, and the share of this machine's matrix-product peak.

    python benchmarks/vqvae.py --threads 1
    python benchmarks/vqvae.py --sizes 64 --compile

The paper's two-level model at its widths. Rates are per second of processor time, the threads' added up; operations are
counted on the meta device (a training step is three forwards). The peak is measured in the same precision, so the
share says how much of what the machine can do goes into the model.
"""

import itertools

import torch
from timing import arguments, matmul_peak, measure

from models.config import LevelConfig, VQVAEConfig
from models.cost import forward_flops
from models.quantizer import Share
from models.vqvae import VQVAE

CONFIG = VQVAEConfig({"top": LevelConfig(stride=8), "bottom": LevelConfig(stride=4)})
BATCH = {64: 32, 128: 16, 256: 4}


def forward_cost(size: int) -> dict[str, int]:
    """Count one image's operations."""
    with torch.device("meta"):
        vqvae, image = VQVAE(CONFIG), torch.empty(1, 3, size, size)
    return {"train": 3 * forward_flops(lambda: vqvae(image)), "encode": forward_flops(lambda: vqvae.encode(image))}


def contenders(size: int, dtype: torch.dtype, layout: torch.memory_format, compiled: bool) -> dict:
    """Build the two calls to be timed."""
    torch.manual_seed(0)
    vqvae = VQVAE(CONFIG).to(memory_format=layout)  # type: ignore[call-overload]
    images = (torch.rand(BATCH[size], 3, size, size) * 2 - 1).to(memory_format=layout)
    optimizer = torch.optim.Adam(vqvae.parameters(), lr=3e-4)
    forward = torch.compile(vqvae) if compiled else vqvae
    steps = itertools.count()

    def train() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            output = forward(images, Share(seed=0, step=next(steps), start=0, total=len(images)))
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
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    print(f"{options.threads} threads, torch {torch.__version__}, compiled: {options.compile}")
    print(
        f"{'pixels':>6} {'batch':>5} {'numbers':8} {'layout':17} {'call':6} {'images/s':>9} {'GFLOP/s peak':>13} share"
    )
    for dtype in (torch.float32, torch.bfloat16):
        peak = matmul_peak(dtype)
        for size in options.sizes:
            cost = forward_cost(size)
            for layout in (torch.contiguous_format, torch.channels_last):
                for name, seconds in measure(contenders(size, dtype, layout, options.compile), options.rounds).items():
                    rate = BATCH[size] / seconds.processor
                    print(
                        f"{size:6} {BATCH[size]:5} {str(dtype)[6:]:8} {str(layout)[6:]:17} {name:6} {rate:9.1f}"
                        f" {peak / 1e9:13.0f} {rate * cost[name] / peak:6.0%}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
