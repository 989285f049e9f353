"""Vector quantizer: the nearest codebook entry stands in for each latent vector.

B images, H x W grid of latent vectors, D numbers per vector, K codebook entries. `forward` looks and `absorb` learns;
in between the caller may add up sums over any number of workers, and nothing else ever crosses between them.
Sources: van den Oord et al. 2017, equations 1-3 and appendix A.1; Razavi et al. 2019, section 3.1.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64, Num
from torch import Tensor, nn
from torch.nn import functional as F

from models.config import QuantizerConfig


class Share(NamedTuple):
    """Which images of the global batch a worker holds, and what makes this step's draws its own."""

    seed: int
    step: int
    start: int  # the global number of the worker's first image, from 0
    total: int  # images in the global batch, over all workers


class CodebookSums(NamedTuple):
    """What one batch says about the codebook. Each tensor adds up, over batches and over workers."""

    counts: Float[Tensor, " K"]  # how many vectors each entry stood in for
    vectors: Float[Tensor, "K D"]  # the sum of those vectors
    candidates: Float[Tensor, "K D"]  # a vector of the global batch per entry; zeros where another worker holds it


class Quantized(NamedTuple):
    """What became of a grid of latent vectors."""

    latents: Float[Tensor, "B D H W"]  # the chosen entries; gradients pass straight through to the input
    codes: Int64[Tensor, "B H W"]
    commitment: Float[Tensor, ""]  # mean squared distance; pulls the encoder towards its entries
    codebook: Float[Tensor, ""]  # the same distance; pulls entries towards the encoder in mode `loss`, else 0
    sums: CodebookSums


class Quantizer(nn.Module):
    """A codebook of K entries of D numbers and the rule it learns by.

    Mode `ema` moves entries by moving averages (equation 3), `loss` by gradients (equation 2), and `none` lets the
    latents through unchanged: its codes are all zero and `lookup` gives zeros, so only `forward` is of use there.
    Everything here runs in fp32, under autocast too (and as exactly as `torch.set_float32_matmul_precision` lets it).
    All state is in the state dict and equal on all workers. Nothing waits for the device, and nothing here depends on
    a worker's own data, so no worker can be left waiting for another.
    """

    # Distances are taken a block of vectors at a time: a block stays in a CPU's cache, and on a GPU it bounds memory.
    _block_on_cpu = 2048
    _block_elsewhere = 65_536

    codebook: Tensor
    counts: Tensor
    vectors: Tensor
    window: Tensor
    steps: Tensor

    def __init__(self, config: QuantizerConfig, entries: int, dim: int, level: int = 0) -> None:
        super().__init__()
        if entries < 1 or dim < 1:
            raise ValueError(f"a codebook has {entries} entries of {dim} numbers; use 1 or more of each")
        self.config, self.entries, self.dim, self.level = config, entries, dim, level
        if config.mode == "none":
            return
        codebook = torch.empty(entries, dim).uniform_(-1 / entries, 1 / entries)
        if config.mode == "ema":
            self.register_buffer("codebook", codebook)
            # Counts and sums start in agreement: were counts to start at 0, an unpicked entry would be divided by
            # next to nothing, fly off and never be picked again.
            self.register_buffer("vectors", codebook.clone())
        else:
            self.codebook = nn.Parameter(codebook)
        self.register_buffer("counts", torch.ones(entries))  # moving average of vectors per step
        self.register_buffer("window", torch.zeros(entries))  # vectors since the last revival, if any comes
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, latents: Float[Tensor, "B D H W"], share: Share | None = None) -> Quantized:
        """Quantize latents and say what they tell the codebook, which stays as it is.

        Without a share the batch counts as the whole of the global batch.
        """
        with _full_precision(latents.device):
            latents = latents.float()
            if self.config.mode == "none":
                return self._unquantized(latents)
            flat = latents.permute(0, 2, 3, 1).reshape(-1, self.dim)  # a view in channels_last
            codes = self._nearest(flat)
            chosen = F.embedding(codes, self.codebook)
            commitment = F.mse_loss(flat, chosen.detach())
            learning = self.config.mode == "loss"
            codebook = F.mse_loss(chosen, flat.detach()) if learning else torch.zeros_like(commitment)
            grid = (latents.shape[0], *latents.shape[2:])
            # Value and gradient apart: `flat + (chosen - flat).detach()` would round, and then an image decoded from
            # its codes would differ from its reconstruction.
            through = chosen.detach() + (flat - flat.detach())
            return Quantized(
                latents=through.unflatten(0, grid).permute(0, 3, 1, 2),
                codes=codes.unflatten(0, grid),
                commitment=commitment,
                codebook=codebook,
                sums=self._sums(flat.detach(), codes, share or Share(0, 0, 0, grid[0]), grid[0]),
            )

    @torch.no_grad()
    def absorb(self, sums: CodebookSums) -> None:
        """Learn from one step's sums over the global batch: moving averages, first placement, revival.

        The first call places every entry on a vector of the batch; each later one moves the entries that were picked
        by equation 3 with Laplace smoothing (with decay 0, a Lloyd step of k-means). In mode `loss` this only places
        and revives entries.
        """
        if self.config.mode == "none":
            return
        decay, every = self.config.decay, self.config.revive_every
        total = sums.counts.sum()
        even = total / self.entries
        self.counts.lerp_(sums.counts, 1 - decay)

        first = self.steps == 0
        self.steps += 1
        dead = torch.zeros_like(self.window, dtype=torch.bool)
        if every:
            self.window += sums.counts
            due = self.steps % every == 0
            dead = due & (self.window < self.config.revive_below * self.window.sum() / self.entries)
            self.window.masked_fill_(due, 0)
        placed = first | dead

        # A placed entry has the weight of an even share of one batch, so that it soon goes where its vectors are.
        self.counts.copy_(torch.where(placed, (1 - decay) * even, self.counts))
        if self.config.mode == "ema":
            self.vectors.lerp_(sums.vectors, 1 - decay)
            self.vectors.copy_(torch.where(placed[:, None], self.counts[:, None] * sums.candidates, self.vectors))
            mean = self.vectors / self._smoothed_counts()[:, None]
            # By equation 3 an entry that is not picked stays where it is, for its sum and its count decay alike. Under
            # smoothing its count would not, and it would creep to the origin; so it is left alone.
            self.codebook.copy_(torch.where(sums.counts[:, None] > 0, mean, self.codebook))
        self.codebook.copy_(torch.where(placed[:, None], sums.candidates, self.codebook))

    def lookup(self, codes: Int64[Tensor, "B H W"]) -> Float[Tensor, "B D H W"]:
        """Give the entries that codes name."""
        if self.config.mode == "none":
            return torch.zeros(codes.shape[0], self.dim, *codes.shape[1:], device=codes.device)
        if codes.dtype != torch.int64:
            raise ValueError(f"codes are {codes.dtype}; use torch.int64, such as codes.long()")
        if codes.numel():
            lowest, highest = (int(code) for code in codes.aminmax())
            if lowest < 0 or highest >= self.entries:
                raise ValueError(
                    f"codes run from {lowest} to {highest}, but the codebook has {self.entries} entries; "
                    f"use codes from 0 to {self.entries - 1}, made by this model"
                )
        return F.embedding(codes, self.codebook).permute(0, 3, 1, 2)

    def mean(self) -> Float[Tensor, " D"]:
        """Average the entries, each weighted by how often it is chosen."""
        if self.config.mode == "none":
            return torch.zeros(self.dim)
        return (self.counts / self.counts.sum()) @ self.codebook.detach()

    def _nearest(self, flat: Float[Tensor, "N D"]) -> Int64[Tensor, " N"]:
        """Name each vector's nearest entry, the lowest of equals (equation 1)."""
        centre = self._centre()
        codebook = self.codebook.detach() - centre
        squares = codebook.square().sum(1)
        rows = self._block_on_cpu if flat.device.type == "cpu" else self._block_elsewhere
        # |z - e|^2 without |z|^2, which is the same for every entry.
        blocks = (block - centre for block in flat.detach().split(rows))
        return torch.cat([torch.addmm(squares, block, codebook.T, alpha=-2).argmin(1) for block in blocks])

    def _centre(self) -> Float[Tensor, " D"]:
        """Say from where to measure distances: far from the origin, |e|^2 and z e would drown the differences.

        It is the mean entry to a power of two near the entries' spread, so that subtracting it rounds nothing, and
        exactly 0 where the entries lie around the origin.
        """
        codebook, shares = self.codebook.detach(), (self.counts / self.counts.sum())[:, None]
        mean = (shares * codebook).sum(0)
        spread = (shares * (codebook - mean).abs()).sum(0)
        unit = spread.clamp(min=2.0**-40).log2().floor().exp2()
        return (mean / unit).round() * unit

    def _sums(self, flat: Float[Tensor, "N D"], codes: Int64[Tensor, " N"], share: Share, images: int) -> CodebookSums:
        counts = flat.new_zeros(self.entries).index_add_(0, codes, flat.new_ones(len(codes)))
        vectors = flat.new_zeros(self.entries, self.dim).index_add_(0, codes, flat)
        per_image = len(flat) // images
        here = self._candidate_positions(share, per_image, flat.device) - share.start * per_image
        held = (here >= 0) & (here < len(flat))
        candidates = flat[here.clamp(0, len(flat) - 1)].masked_fill(~held[:, None], 0)
        return CodebookSums(counts, vectors, candidates)

    def _candidate_positions(self, share: Share, per_image: int, device: torch.device) -> Int64[Tensor, " K"]:
        """Draw a vector of the global batch for each entry, alike on every worker.

        The vectors fall into K strata of consecutive ones and each entry draws from its own, so that no vector is drawn
        twice while there are K or more.
        """
        entries = torch.arange(self.entries, device=device)
        key = share.seed * 0xC2B2_AE35 % 2**32 + share.step * 0x85EB_CA6B % 2**32 + self.level * 0x27D4_EB2F
        draws = _scramble((entries * 0x9E37_79B1 + key) & 0xFFFF_FFFF)
        total = share.total * per_image
        low, high = entries * total // self.entries, (entries + 1) * total // self.entries
        return low + draws % (high - low).clamp(min=1)

    def _smoothed_counts(self) -> Float[Tensor, " K"]:
        """Laplace smoothing: every count a little nearer to an even split, their sum unchanged."""
        total, epsilon = self.counts.sum(), self.config.epsilon
        return (self.counts + epsilon) / (total + self.entries * epsilon) * total

    def _unquantized(self, latents: Float[Tensor, "B D H W"]) -> Quantized:
        nothing = latents.new_zeros(())
        codes = torch.zeros(latents.shape[0], *latents.shape[2:], dtype=torch.int64, device=latents.device)
        still = latents.new_zeros(self.entries, self.dim)
        sums = CodebookSums(counts=latents.new_zeros(self.entries), vectors=still, candidates=still.clone())
        return Quantized(latents, codes, commitment=nothing, codebook=nothing, sums=sums)


def perplexity(counts: Num[Tensor, " K"]) -> float:
    """Say how many entries are in even use: 1 (one does it all) to K. Sum the counts of a window of steps first."""
    shares = counts.double() / counts.sum()
    return float(torch.special.entr(shares).sum().exp())


def _scramble(words: Int64[Tensor, " K"]) -> Int64[Tensor, " K"]:
    """Hash 32-bit numbers one to one, in integers so that every device agrees (lowbias32 of Chris Wellons)."""
    words = ((words ^ (words >> 16)) * 0x7FEB_352D) & 0xFFFF_FFFF
    words = ((words ^ (words >> 15)) * 0x846C_A68B) & 0xFFFF_FFFF
    return words ^ (words >> 16)


def _full_precision(device: torch.device) -> AbstractContextManager:
    """Turn autocast off, on devices that have it."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
