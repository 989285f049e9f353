"""Sampling of codes from a prior in raster order. The samples do not depend on batch size, device or method.

A code is the argmax of log-probability plus Gumbel noise, which chooses each entry with its probability (Gumbel-max).
The noise is a function of (seed, sample ID, grid size, position, entry) and nothing else: SplitMix64 with a key of the
first four, at a counter of the entry. Methods, batch sizes and devices differ only in the rounding of logits: a code
can differ only if two entries are within about 1e-6 of each other. Matrix products therefore use the weights' own
precision, single or double.

B grids, H x W positions, K codebook entries.
Source: Steele et al. 2014 (SplitMix64); Maddison et al. 2014 (Gumbel-max); Ho and Salimans 2022, arXiv 2207.12598
(classifier-free guidance).
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from models.config import check_field, check_sampling_rule
from models.precision import reduced_precision_disabled
from models.priors import Prior
from models.priors.cached import CachedPrior
from models.priors.layers import NO_LABEL
from models.random import GOLDEN_GAMMA, fold_in, splitmix64, to_signed

METHODS = ("cached", "naive")


class SamplingRule(NamedTuple):
    """Random choice of a code from logits, divided by `temperature` and limited to the most probable entries."""

    temperature: float = 1.0
    top_k: int = 0  # entries; 0 keeps all
    top_p: float = 1.0  # total probability of the fewest entries that reach it, at least one; 1 keeps all

    def __call__(self, logits: Float[Tensor, "B K"], noise: Float64[Tensor, "B K"]) -> Int64[Tensor, " B"]:
        """Choose one entry per grid."""
        scores = logits.double()
        if self.temperature != 1:
            scores = scores / self.temperature
        if self.top_k or self.top_p < 1:
            scores = self._most_probable(scores)
        return (scores + noise).argmax(-1)

    def _most_probable(self, scores: Float64[Tensor, "B K"]) -> Float64[Tensor, "B K"]:
        """Set the scores of all other entries to -inf."""
        ordered, order = scores.sort(dim=-1, descending=True, stable=True)
        if self.top_k:
            ordered[:, self.top_k :] = -torch.inf
        if self.top_p < 1:
            # An entry stays if the more probable ones do not reach top_p; the first always stays.
            probabilities = ordered.softmax(-1)
            ordered = ordered.masked_fill(probabilities.cumsum(-1) - probabilities >= self.top_p, -torch.inf)
        return torch.empty_like(scores).scatter_(-1, order, ordered)


def guide(logits: Float[Tensor, "_ K"], scale: float) -> Float64[Tensor, "B K"]:
    """Combine logits of B grids with their label, and of the same grids without it: (2B, K).

    Scale 1 gives the former, 0 the latter; above 1, what the label makes more probable gains in probability.
    """
    labelled, unlabelled = logits.double().chunk(2)
    return unlabelled + scale * (labelled - unlabelled)


class _Grids(NamedTuple):
    """Batch of grids to draw, and their conditions."""

    codes: Int64[Tensor, "B H W"]  # filled in place below the prefix
    coarser: Mapping[str, Int64[Tensor, "B _ _"]]
    labels: Int64[Tensor, " B"] | None
    noise: "GumbelNoise"
    prefix_rows: int

    def add_unlabelled(self) -> "_Grids":
        """Return the grids with their labels, and once more without."""
        assert self.labels is not None  # the sampler requires labels for guidance
        return self._replace(
            codes=self.codes.repeat(2, 1, 1),
            coarser={name: grids.repeat(2, 1, 1) for name, grids in self.coarser.items()},
            labels=torch.cat([self.labels, torch.full_like(self.labels, NO_LABEL)]),
        )


class Sampler:
    """Sampler of a prior's codes that keeps its caches, and on CUDA its captured step, between draws.

    It draws at most `batch_size` grids at once, which limits memory and does not change samples. Method "cached"
    computes each code from caches, "naive" runs the whole network for each code. After a change of the prior's weights,
    create another sampler.
    """

    def __init__(
        self,
        prior: Prior,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        guidance: float = 1.0,
        method: Literal["cached", "naive"] = "cached",
        batch_size: int = 256,
    ) -> None:
        """Check the settings. `guidance` is the scale of classifier-free guidance; other than 1 it doubles the work.

        Raises ValueError if a setting is out of range, if the weights are in half precision, or if the prior cannot be
        guided.
        """
        self.prior, self.method, self.guidance, self.batch_size = prior, method, guidance, batch_size
        self.rule = SamplingRule(temperature, top_k, top_p)
        check_sampling_rule(self.rule)
        check_field(self, "guidance", 0 <= guidance < math.inf, "a number, 0 or more")
        if guidance != 1 and not prior.can_be_guided:
            raise ValueError(
                f"guidance must be 1 for a prior that was not trained without labels too, got {guidance}; train it on "
                "labelled images with label_dropout above 0, such as 0.1"
            )
        if method not in METHODS:
            raise ValueError(f"method must be {' or '.join(METHODS)}, got {method!r}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        if prior.head.weight.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                "the prior's weights must be torch.float32 or torch.float64, for both methods to draw the same codes, "
                f"got {prior.head.weight.dtype}; use prior.float()"
            )
        self._cached: _CachedSampler | None = None

    def draw(
        self,
        *,
        seed: int,
        sample_ids: Int64[Tensor, " B"],
        coarser: Mapping[str, Int64[Tensor, "B _ _"]] | None = None,
        labels: Int64[Tensor, " B"] | None = None,
        prefix: Int64[Tensor, "B H W"] | None = None,
        prefix_rows: int = 0,
    ) -> Int64[Tensor, "B H W"]:
        """Draw one grid of codes per sample ID. The first `prefix_rows` rows are copied from `prefix`.

        Raises ValueError for inputs that do not fit the prior.
        """
        prior = self.prior
        _check_sample_ids(sample_ids)
        _check_prefix(prior, prefix, prefix_rows, len(sample_ids))
        device = prior.positions.device
        codes = torch.zeros(len(sample_ids), prior.height, prior.width, dtype=torch.int64, device=device)
        if prefix is not None:
            codes[:, :prefix_rows] = prefix[:, :prefix_rows]
        prior.check(codes, coarser, labels)
        training = prior.training
        prior.eval()
        try:
            # Reduced precision would round logits so coarsely that methods and batch sizes draw different codes.
            with torch.inference_mode(), reduced_precision_disabled(device):
                for start in range(0, len(sample_ids), self.batch_size):
                    batch = slice(start, start + self.batch_size)
                    self._fill(
                        _Grids(
                            codes[batch],
                            {name: grids[batch] for name, grids in (coarser or {}).items()},
                            None if labels is None else labels[batch],
                            GumbelNoise(seed, sample_ids[batch].to(device), prior),
                            prefix_rows,
                        )
                    )
        finally:
            prior.train(training)
        return codes

    def _fill(self, grids: _Grids) -> None:
        if self.method == "naive":
            _fill_naive(self.prior, self.rule, self.guidance, grids)
            return
        if self._cached is None or self._cached.batch != len(grids.codes):
            self._cached = None  # frees its memory first
            self._cached = _CachedSampler(self.prior, len(grids.codes), self.rule, self.guidance)
        self._cached.fill(grids)


def draw(
    prior: Prior,
    *,
    seed: int,
    sample_ids: Int64[Tensor, " B"],
    coarser: Mapping[str, Int64[Tensor, "B _ _"]] | None = None,
    labels: Int64[Tensor, " B"] | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    guidance: float = 1.0,
    method: Literal["cached", "naive"] = "cached",
    batch_size: int = 256,
    prefix: Int64[Tensor, "B H W"] | None = None,
    prefix_rows: int = 0,
) -> Int64[Tensor, "B H W"]:
    """Draw one grid of codes per sample ID with a new `Sampler`. Raises ValueError as `Sampler` and its `draw` do."""
    sampler = Sampler(
        prior,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        guidance=guidance,
        method=method,
        batch_size=batch_size,
    )
    return sampler.draw(
        seed=seed, sample_ids=sample_ids, coarser=coarser, labels=labels, prefix=prefix, prefix_rows=prefix_rows
    )


class GumbelNoise:
    """Gumbel noise of samples of one prior."""

    def __init__(self, seed: int, sample_ids: Int64[Tensor, " B"], prior: Prior) -> None:
        key = splitmix64(torch.tensor(to_signed(seed), device=sample_ids.device))
        # The grid's size is part of the key: the levels of one sample must not share their noise.
        for value in (sample_ids, torch.tensor(prior.height), torch.tensor(prior.width)):
            key = fold_in(key, value)
        self.keys: Tensor = key  # (B,)
        self.width = prior.width
        # SplitMix64's state at each entry, relative to the key.
        self.increments = torch.arange(1, prior.entries + 1, device=sample_ids.device) * to_signed(GOLDEN_GAMMA)

    def row(self, row: int) -> Float64[Tensor, "B W K"]:
        """Return the noise of a row."""
        positions = row * self.width + torch.arange(self.width, device=self.keys.device)
        bits = splitmix64(fold_in(self.keys[:, None], positions)[:, :, None] + self.increments)
        # The top 52 bits, centred in their intervals: uniform in (0, 1), never 0 or 1. Then -log(-log(u)).
        uniform = ((bits >> 12) & (2**52 - 1)).double().add_(0.5).mul_(2.0**-52)
        return uniform.log_().neg_().log_().neg_()


class _CachedSampler:
    """Cached sampler of one batch size: its buffers, and on CUDA a graph of the step at each column."""

    def __init__(self, prior: Prior, batch: int, rule: SamplingRule, guidance: float) -> None:
        self.batch, self.rule, self.guidance = batch, rule, guidance
        self.height, self.width = prior.height, prior.width
        self.streams = 1 if guidance == 1 else 2  # with the label; without it
        device = prior.positions.device
        self.captured = device.type == "cuda"
        self.cache = CachedPrior(prior, batch=self.streams * batch, static=self.captured)
        self.row_codes = torch.zeros(batch, prior.width, dtype=torch.int64, device=device)
        self.row_noise = torch.empty(batch, prior.width, prior.entries, dtype=torch.float64, device=device)
        # Views of each column.
        self.column_codes, self.column_noise = self.row_codes.unbind(1), self.row_noise.unbind(1)
        self.replay: Callable[[int], None] | None = None

    def fill(self, grids: _Grids) -> None:
        streams = grids if self.streams == 1 else grids.add_unlabelled()
        self.cache.reset(streams.coarser, streams.labels)
        for row in range(self.height):
            self.cache.start_row(row)
            if row < grids.prefix_rows:
                self.row_codes.copy_(grids.codes[:, row])
                for column in range(self.width):
                    self.cache.step(column)
                    self._append(column)
            else:
                self.row_noise.copy_(grids.noise.row(row))
                for column in range(self.width):
                    (self.replay or self.step)(column)
                # The first drawn row runs without graphs, which warms up the libraries. Capturing runs nothing, so it
                # changes no buffer.
                if self.captured and self.replay is None:
                    self.replay = _capture(self.step, self.width)
                grids.codes[:, row] = self.row_codes

    def step(self, column: int) -> None:
        logits = self.cache.step(column)
        logits = logits if self.streams == 1 else guide(logits, self.guidance)
        self.column_codes[column].copy_(self.rule(logits, self.column_noise[column]))
        self._append(column)

    def _append(self, column: int) -> None:
        self.cache.append(self.column_codes[column].repeat(self.streams), column)


def _fill_naive(prior: Prior, rule: SamplingRule, guidance: float, grids: _Grids) -> None:
    codes = grids.codes
    for row in range(grids.prefix_rows, prior.height):
        row_noise = grids.noise.row(row)
        for column in range(prior.width):
            streams = grids if guidance == 1 else grids.add_unlabelled()
            logits = prior(streams.codes, streams.coarser, streams.labels)[:, :, row, column]
            logits = logits if guidance == 1 else guide(logits, guidance)
            codes[:, row, column] = rule(logits, row_noise[:, column])


def _capture(step: Callable[[int], None], columns: int) -> Callable[[int], None]:
    """Capture the step at each column as a CUDA graph. A step has dozens of kernels, too small to launch one by one."""
    graphs = [torch.cuda.CUDAGraph() for _ in range(columns)]
    for column, graph in enumerate(graphs):
        with torch.cuda.graph(graph, pool=graphs[0].pool() if column else None):
            step(column)
    return lambda column: graphs[column].replay()


def _check_sample_ids(sample_ids: Tensor) -> None:
    if sample_ids.ndim != 1 or sample_ids.dtype != torch.int64:
        raise ValueError(
            f"sample_ids must be torch.int64 of one axis, got {sample_ids.dtype} of shape {tuple(sample_ids.shape)}; "
            "use for example torch.arange(8)"
        )


def _check_prefix(prior: Prior, prefix: Tensor | None, prefix_rows: int, batch: int) -> None:
    if not 0 <= prefix_rows <= prior.height:
        raise ValueError(f"prefix_rows must be 0 to {prior.height}, the rows of the grid, got {prefix_rows}")
    if prefix_rows and prefix is None:
        raise ValueError(f"prefix_rows must be 0 without prefix, got {prefix_rows}")
    if prefix is not None and prefix.shape != (batch, prior.height, prior.width):
        size, expected = (" x ".join(map(str, shape)) for shape in (prefix.shape, (batch, prior.height, prior.width)))
        raise ValueError(f"prefix must be {expected} codes, of which the first rows are read, got {size}")
    if prefix is not None and prefix.dtype != torch.int64:
        raise ValueError(f"prefix must be torch.int64, got {prefix.dtype}; use prefix.long()")
