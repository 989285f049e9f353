"""Vector quantizer: replaces each latent vector by its nearest codebook entry.

B images, H x W grid of latent vectors, D numbers per vector, N = B x H x W vectors, K codebook entries.
`forward` only computes, `absorb` updates the codebook. Between them the caller may add the sums of any number of
workers: nothing else is exchanged.
Sources: van den Oord et al. 2017, equations 1-3 and appendix A.1; Razavi et al. 2019, section 3.1.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Num
from torch import Tensor, nn

from models.config import QuantizerConfig
from models.precision import autocast_disabled
from models.random import hash32

# Distances to all entries are computed for blocks of this many vectors: a block fits a CPU's cache, and bounds the
# memory on a GPU.
BLOCK_CPU = 2048
BLOCK_GPU = 65_536


class BatchSlice(NamedTuple):
    """Position of some of a worker's images in the global batch, and the key of the step's random numbers."""

    seed: int
    step: int
    start: int  # global index of the first of these images, from 0
    total: int  # images in the global batch, over all workers


class CodebookSums(NamedTuple):
    """Codebook statistics of one batch. Additive over batches and workers."""

    counts: Float[Tensor, " K"]  # vectors assigned to each entry
    vectors: Float[Tensor, "K D"]  # sum of the assigned vectors
    candidates: Float[Tensor, "K D"]  # one random vector of the global batch per entry; zeros if another worker has it


class Quantized(NamedTuple):
    """Quantizer output."""

    latents: Float[Tensor, "B D H W"]  # chosen entries; gradients pass straight through to the input
    codes: Int64[Tensor, "B H W"]
    commitment: Float[Tensor, ""]  # mean squared distance, with gradients to the encoder
    codebook: Float[Tensor, ""]  # the same distance, with gradients to the entries, in mode `loss`; otherwise 0
    sums: CodebookSums


class Quantizer(nn.Module):
    """Codebook of K entries of D numbers, and its learning rule.

    Mode `ema` moves entries by moving averages (equation 3) and `loss` by gradients (equation 2). Mode `none` returns
    the latents unchanged: its codes are all zero and `lookup` returns zeros, so only `forward` is useful.
    All computations run in float32, also under autocast; `torch.set_float32_matmul_precision` applies. The state dict
    holds all state, which is equal on all workers. Neither `forward` nor `absorb` waits for the device, and their
    operations do not depend on a worker's values, so workers cannot get out of step.
    """

    codebook: Tensor
    counts: Tensor
    vectors: Tensor
    window: Tensor
    steps: Tensor

    def __init__(self, config: QuantizerConfig, entries: int, dim: int, level: int = 0) -> None:
        """`level` is the index of the codebook's level, part of the key of its random numbers.

        Raises ValueError if the codebook has no entries or no dimensions.
        """
        super().__init__()
        if entries < 1 or dim < 1:
            raise ValueError(f"entries and dim must be 1 or more, got {entries} and {dim}")
        self.config, self.entries, self.dim, self.level = config, entries, dim, level
        if config.mode == "none":
            return
        codebook = torch.empty(entries, dim).uniform_(-1 / entries, 1 / entries)
        if config.mode == "ema":
            self.register_buffer("codebook", codebook)
            # Initial counts of 1 and sums equal to the entries are consistent. With counts of 0, an entry that is not
            # chosen would be divided by almost 0, move far away and never be chosen again.
            self.register_buffer("vectors", codebook.clone())
        else:
            self.codebook = nn.Parameter(codebook)
        self.register_buffer("counts", torch.ones(entries))  # moving average of assigned vectors per step
        self.register_buffer("window", torch.zeros(entries))  # vectors assigned since the last revival
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, latents: Float[Tensor, "B D H W"], batch_slice: BatchSlice | None = None) -> Quantized:
        """Quantize latents and sum the codebook statistics. The codebook does not change.

        Without a batch slice the batch is the global batch.
        """
        with autocast_disabled(latents.device.type):
            latents = latents.float()
            if self.config.mode == "none":
                return self._unquantized(latents)
            flat = latents.permute(0, 2, 3, 1).reshape(-1, self.dim)  # (N, D); a view in channels_last
            codes = self._nearest(flat)
            chosen = F.embedding(codes, self.codebook)
            # Equation 2: the commitment term moves latents, the codebook term moves entries.
            commitment = F.mse_loss(flat, chosen.detach())
            by_gradients = self.config.mode == "loss"
            codebook = F.mse_loss(chosen, flat.detach()) if by_gradients else torch.zeros_like(commitment)
            # Straight-through estimator. The common form `flat + (chosen - flat).detach()` rounds: an image decoded
            # from its codes would differ from its reconstruction. Here the added term is exactly 0.
            straight_through = chosen.detach() + (flat - flat.detach())
            grid = (latents.shape[0], *latents.shape[2:])
            batch_slice = batch_slice or BatchSlice(0, 0, 0, grid[0])
            return Quantized(
                latents=straight_through.unflatten(0, grid).permute(0, 3, 1, 2),
                codes=codes.unflatten(0, grid),
                commitment=commitment,
                codebook=codebook,
                sums=self._sums(flat.detach(), codes, batch_slice, grid[0]),
            )

    @torch.no_grad()
    def absorb(self, sums: CodebookSums) -> None:
        """Update the codebook from the sums of one step over the global batch.

        The first call places every entry on a vector of the batch, unless they start at random. Later calls move the
        chosen entries by equation 3 with Laplace smoothing (with decay 0, a Lloyd step of k-means) and revive dead
        entries. In mode `loss` this only places and revives entries.
        """
        if self.config.mode == "none":
            return
        decay, every = self.config.decay, self.config.revive_every
        total = sums.counts.sum()
        even_share = total / self.entries
        # Equation 3, counts: N_i <- decay N_i + (1 - decay) n_i.
        self.counts.lerp_(sums.counts, 1 - decay)

        # Entries to place on a candidate vector: all in the first step, dead ones every `revive_every` steps. Masks
        # instead of branches: a branch would wait for the device.
        first = (self.steps == 0) & (self.config.initial == "data")
        self.steps += 1
        dead = torch.zeros_like(self.window, dtype=torch.bool)
        if every:
            self.window += sums.counts
            due = self.steps % every == 0
            dead = due & (self.window < self.config.revive_below * self.window.sum() / self.entries)
            self.window.masked_fill_(due, 0)
        placed = first | dead

        # A placed entry has the weight of an even share of one batch, so it soon moves to the vectors assigned to it.
        self.counts.copy_(torch.where(placed, (1 - decay) * even_share, self.counts))
        if self.config.mode == "ema":
            # Equation 3, sums and entries: m_i <- decay m_i + (1 - decay) sum_j z_ij; e_i = m_i / N_i.
            self.vectors.lerp_(sums.vectors, 1 - decay)
            self.vectors.copy_(torch.where(placed[:, None], self.counts[:, None] * sums.candidates, self.vectors))
            mean = self.vectors / self._smoothed_counts()[:, None]
            # By equation 3 an entry that is not chosen stays in place: its sum and its count decay alike. Smoothing
            # adds to its count, which would move it slowly to the origin, so it is not updated.
            self.codebook.copy_(torch.where(sums.counts[:, None] > 0, mean, self.codebook))
        self.codebook.copy_(torch.where(placed[:, None], sums.candidates, self.codebook))

    def lookup(self, codes: Int64[Tensor, "B H W"]) -> Float[Tensor, "B D H W"]:
        """Return the entries of codes. Raises ValueError for codes of another dtype or outside the codebook."""
        if self.config.mode == "none":
            return torch.zeros(codes.shape[0], self.dim, *codes.shape[1:], device=codes.device)
        if codes.dtype != torch.int64:
            raise ValueError(f"codes must be torch.int64, got {codes.dtype}; use codes.long()")
        if codes.numel():
            lowest, highest = (int(code) for code in codes.aminmax())
            if lowest < 0 or highest >= self.entries:
                raise ValueError(
                    f"codes must be 0 to {self.entries - 1}, as the codebook has {self.entries} entries, "
                    f"got {lowest} to {highest}; use codes of this model"
                )
        return F.embedding(codes, self.codebook).permute(0, 3, 1, 2)

    def mean(self) -> Float[Tensor, " D"]:
        """Return the mean entry, weighted by how often each is chosen."""
        if self.config.mode == "none":
            return torch.zeros(self.dim)
        return (self.counts / self.counts.sum()) @ self.codebook.detach()

    def _nearest(self, flat: Float[Tensor, "N D"]) -> Int64[Tensor, " N"]:
        """Return the index of each vector's nearest entry, the lowest index of equals (equation 1)."""
        centre = self._centre()
        codebook = self.codebook.detach() - centre
        squares = codebook.square().sum(1)
        block_size = BLOCK_CPU if flat.device.type == "cpu" else BLOCK_GPU
        # |z - e|^2 = |z|^2 - 2 z.e + |e|^2. The first term is the same for every entry and left out.
        blocks = (block - centre for block in flat.detach().split(block_size))
        return torch.cat([torch.addmm(squares, block, codebook.T, alpha=-2).argmin(1) for block in blocks])

    def _centre(self) -> Float[Tensor, " D"]:
        """Return the origin for distances: near the mean entry, and exactly 0 if entries surround 0.

        Far from the origin, |e|^2 and z.e are large and their rounding errors hide the differences between entries. The
        centre is the mean entry, rounded to a multiple of a power of two near the entries' spread: subtracting such a
        number does not round.
        """
        codebook, frequencies = self.codebook.detach(), (self.counts / self.counts.sum())[:, None]
        mean = (frequencies * codebook).sum(0)
        spread = (frequencies * (codebook - mean).abs()).sum(0)
        unit = spread.clamp(min=2.0**-40).log2().floor().exp2()  # the minimum avoids log2(0)
        return (mean / unit).round() * unit

    def _sums(
        self, flat: Float[Tensor, "N D"], codes: Int64[Tensor, " N"], batch_slice: BatchSlice, images: int
    ) -> CodebookSums:
        counts = flat.new_zeros(self.entries).index_add_(0, codes, flat.new_ones(len(codes)))
        vectors = flat.new_zeros(self.entries, self.dim).index_add_(0, codes, flat)
        # Each worker fills in the candidates that it holds and leaves zeros elsewhere: the sum over workers has all.
        per_image = len(flat) // images
        global_positions = self._candidate_positions(batch_slice, per_image, flat.device)
        positions = global_positions - batch_slice.start * per_image
        is_local = (positions >= 0) & (positions < len(flat))
        candidates = flat[positions.clamp(0, len(flat) - 1)].masked_fill(~is_local[:, None], 0)
        return CodebookSums(counts, vectors, candidates)

    def _candidate_positions(
        self, batch_slice: BatchSlice, per_image: int, device: torch.device
    ) -> Int64[Tensor, " K"]:
        """Choose a vector of the global batch for each entry, the same on every worker.

        The vectors are split into K strata of consecutive ones, and each entry draws from its own stratum: no vector is
        drawn twice if there are K or more.
        """
        entries = torch.arange(self.entries, device=device)
        # Odd multipliers, from MurmurHash3 and xxHash32, spread small seeds, steps and levels over 32 bits.
        key = batch_slice.seed * 0xC2B2_AE35 % 2**32 + batch_slice.step * 0x85EB_CA6B % 2**32 + self.level * 0x27D4_EB2F
        numbers = hash32((entries * 0x9E37_79B1 + key) & 0xFFFF_FFFF)
        total = batch_slice.total * per_image
        low, high = entries * total // self.entries, (entries + 1) * total // self.entries
        return low + numbers % (high - low).clamp(min=1)

    def _smoothed_counts(self) -> Float[Tensor, " K"]:
        """Apply Laplace smoothing: each count moves towards an even split, and the total stays the same."""
        total, epsilon = self.counts.sum(), self.config.epsilon
        return (self.counts + epsilon) / (total + self.entries * epsilon) * total

    def _unquantized(self, latents: Float[Tensor, "B D H W"]) -> Quantized:
        zero = latents.new_zeros(())
        codes = torch.zeros(latents.shape[0], *latents.shape[2:], dtype=torch.int64, device=latents.device)
        zeros = latents.new_zeros(self.entries, self.dim)
        sums = CodebookSums(counts=latents.new_zeros(self.entries), vectors=zeros, candidates=zeros.clone())
        return Quantized(latents, codes, commitment=zero, codebook=zero, sums=sums)


def perplexity(counts: Num[Tensor, " K"]) -> float:
    """Return exp(entropy) of the use of entries: 1 if one entry is used, K if all are used evenly.

    `counts` are summed over the steps or batches of interest.
    """
    frequencies = counts.double() / counts.sum()
    return float(torch.special.entr(frequencies).sum().exp())
