"""One quantizer step, forward + backward + codebook update, against the usual one-hot implementation in plain torch.

    python benchmarks/quantizer.py --threads 1

32,768 vectors of 64 numbers, 512 entries: the bottom level of eight images of 256 x 256. The floor is the
time of the distances alone, block by block, with their argmin.
"""

import torch
import torch.nn.functional as F
from timing import arguments, measure, table
from torch import Tensor

from models.config import QuantizerConfig
from models.quantizer import Quantizer


class OneHotQuantizer(torch.nn.Module):
    """Common implementation of equation 3: all distances at once, one-hot rows, matrix products for the sums."""

    def __init__(self, entries: int, dim: int, decay: float = 0.99, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.entries, self.decay, self.epsilon = entries, decay, epsilon
        self.codebook = torch.randn(entries, dim)
        self.counts, self.vectors = torch.ones(entries), self.codebook.clone()

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize and, in training, update the codebook."""
        rows = latents.permute(0, 2, 3, 1)
        flat = rows.reshape(-1, rows.shape[-1])
        distances = flat.square().sum(1, keepdim=True) - 2 * flat @ self.codebook.T + self.codebook.square().sum(1)
        codes = distances.argmin(1)
        chosen = F.embedding(codes, self.codebook).view(rows.shape)
        if not torch.is_inference_mode_enabled():
            self._update(flat.detach(), codes)
        commitment = F.mse_loss(rows, chosen.detach())
        return (rows + (chosen - rows).detach()).permute(0, 3, 1, 2), commitment, codes.view(rows.shape[:-1])

    def _update(self, flat: Tensor, codes: Tensor) -> None:
        one_hot = F.one_hot(codes, self.entries).to(flat.dtype)
        self.counts.lerp_(one_hot.sum(0), 1 - self.decay)
        self.vectors.lerp_(one_hot.T @ flat, 1 - self.decay)
        total = self.counts.sum()
        smoothed = (self.counts + self.epsilon) / (total + self.entries * self.epsilon) * total
        self.codebook = self.vectors / smoothed[:, None]


@torch.no_grad()
def count_wrong_codes(quantizer: Quantizer, latents: Tensor, offset: float) -> int:
    """Count codes that differ from a search in double precision, with an offset on vectors and entries."""
    latents = latents + offset
    moved = Quantizer(quantizer.config, quantizer.entries, quantizer.dim)
    moved.codebook.copy_(quantizer.codebook + offset)
    flat, entries = latents.permute(0, 2, 3, 1).reshape(-1, moved.dim), moved.codebook.double()
    nearest = [
        torch.cdist(block.double(), entries, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
        for block in flat.split(2048)
    ]
    return int((moved(latents).codes.flatten() != torch.cat(nearest)).sum())


def main() -> None:
    """Check that the codes are exact, and time both implementations."""
    options = arguments(__doc__).parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    latents = torch.randn(8, 64, 64, 64).to(memory_format=torch.channels_last).requires_grad_()
    upstream = torch.randn(8, 64, 64, 64).to(memory_format=torch.channels_last)
    ours, usual = Quantizer(QuantizerConfig(), entries=512, dim=64), OneHotQuantizer(512, 64)
    ours.absorb(ours(latents).sums)
    usual.codebook = ours.codebook.clone()
    for offset in (0, 1000):  # far from the origin too
        differing = count_wrong_codes(ours, latents.detach(), offset)
        print(f"codes that differ from brute force, offset {offset}: {differing} of {latents.numel() // 64}")
        if differing:
            raise SystemExit("the codes are not exact: fix them before comparing speed")

    def step_ours() -> None:
        quantized = ours(latents)
        torch.autograd.backward([quantized.latents, quantized.commitment], [upstream, torch.tensor(0.25)])
        ours.absorb(quantized.sums)

    def step_usual() -> None:
        quantized, commitment, _ = usual(latents)
        torch.autograd.backward([quantized, commitment], [upstream, torch.tensor(0.25)])

    @torch.no_grad()
    def floor() -> None:
        squares = ours.codebook.square().sum(1)
        for block in latents.permute(0, 2, 3, 1).reshape(-1, 64).split(2048):
            torch.addmm(squares, block, ours.codebook.T, alpha=-2).argmin(1)

    def forward_only() -> None:
        with torch.inference_mode():
            ours(latents)

    calls = {"ours": step_ours, "one-hot": step_usual, "ours, forward only": forward_only, "floor: distances": floor}
    table("quantizer step, 32,768 x 64, 512 entries", measure(calls, options.rounds), ours="ours")


if __name__ == "__main__":
    main()
