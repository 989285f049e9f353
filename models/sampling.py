"""Draw codes from a prior, in raster order, the same ones whoever draws them.

A code is the entry with the largest log-probability plus Gumbel noise, which picks each entry with its probability.
The noise is a function of (seed, sample number, grid, position, entry) and of nothing else: SplitMix64, keyed by the
first four and counted by the last. So batch size, device and sampler do not change a sample, as far as the logits
they compute agree: two entries must lie within the logits' rounding, some 1e-6, for the choice to differ.
B grids, H x W positions, K entries.
Source: Steele et al. 2014 (SplitMix64); Maddison et al. 2014 (Gumbel-max).
"""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from models.priors import Prior
from models.priors.cached import CachedPrior

GOLDEN = 0x9E3779B97F4A7C15


class Choice(NamedTuple):
    """How a code is chosen from the logits: divided by `temperature`, of the `top_k` and `top_p` likeliest only."""

    temperature: float = 1.0
    top_k: int = 0  # entries; 0 keeps all
    top_p: float = 1.0  # of the probability, at least one entry; 1 keeps all

    def check(self) -> None:
        """Raise ValueError for a setting that means nothing."""
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; use a positive number")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_k is {self.top_k} and top_p {self.top_p}; use top_k 0 or more, top_p above 0 up to 1"
            )

    def __call__(self, logits: Float[Tensor, "B K"], noise: Float64[Tensor, "B K"]) -> Int64[Tensor, " B"]:
        """Choose one entry per grid."""
        scores = logits.double()
        if self.temperature != 1:
            scores = scores / self.temperature
        if self.top_k or self.top_p < 1:
            scores = self._likeliest(scores)
        return (scores + noise).argmax(-1)

    def _likeliest(self, scores: Float64[Tensor, "B K"]) -> Float64[Tensor, "B K"]:
        ordered, order = scores.sort(dim=-1, descending=True, stable=True)
        if self.top_k:
            ordered[:, self.top_k :] = -torch.inf
        if self.top_p < 1:
            probabilities = ordered.softmax(-1)
            ordered = ordered.masked_fill(probabilities.cumsum(-1) - probabilities >= self.top_p, -torch.inf)
        return torch.empty_like(scores).scatter_(-1, order, ordered)


def draw(
    prior: Prior,
    *,
    seed: int,
    numbers: Int64[Tensor, " B"],
    coarser: Mapping[str, Int64[Tensor, "B _ _"]] | None = None,
    labels: Int64[Tensor, " B"] | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    method: Literal["cached", "naive"] = "cached",
    given: Int64[Tensor, "B H W"] | None = None,
    given_rows: int = 0,
    on_row: Callable[[int], None] | None = None,
) -> Int64[Tensor, "B H W"]:
    """Draw one grid of codes for each sample number.

    The uppermost `given_rows` rows are those of `given`. `on_row` hears how many rows are done. Naive runs the whole
    network for each code. Memory grows with the batch, so draw many samples in several calls.
    """
    choice = Choice(temperature, top_k, top_p)
    choice.check()
    _check_given(prior, given, given_rows, len(numbers))
    device = prior.positions.device
    codes = torch.zeros(len(numbers), prior.height, prior.width, dtype=torch.int64, device=device)
    if given is not None:
        codes[:, :given_rows] = given[:, :given_rows]
    prior.check(codes, coarser, labels)
    noise = Noise(seed, numbers.to(device), prior)
    training = prior.training
    prior.eval()
    try:
        sampler = _draw_cached if method == "cached" else _draw_naive
        with torch.inference_mode():
            sampler(prior, codes, coarser, labels, noise, choice, given_rows, on_row or (lambda rows: None))
    finally:
        prior.train(training)
    return codes


@torch.inference_mode()
def score_cached(
    prior: Prior,
    codes: Int64[Tensor, "B H W"],
    coarser: Mapping[str, Int64[Tensor, "B _ _"]] | None = None,
    labels: Int64[Tensor, " B"] | None = None,
    *,
    static: bool = False,
) -> Float[Tensor, "B K H W"]:
    """Score given codes with the caches that draw them: what `prior(codes, ...)` gives, position by position."""
    prior.check(codes, coarser, labels)
    cache = CachedPrior(prior, batch=len(codes), coarser=coarser, labels=labels, static=static)
    rows = []
    for row in range(prior.height):
        cache.start_row(row)
        columns = []
        for column in range(prior.width):
            columns.append(cache.step(column))
            cache.absorb(codes[:, row, column], column)
        rows.append(torch.stack(columns, -1))
    return torch.stack(rows, -2)


class Noise:
    """Gumbel noise for the samples `numbers` of one prior."""

    def __init__(self, seed: int, numbers: Int64[Tensor, " B"], prior: Prior) -> None:
        key = _mix(torch.tensor(_signed(seed), device=numbers.device))
        # The grid's size is part of the key: the levels of one sample must not share their noise.
        for value in (numbers, torch.tensor(prior.height), torch.tensor(prior.width)):
            key = _fold(key, value)
        self.keys: Tensor = key
        self.width = prior.width
        self.entries = torch.arange(1, prior.entries + 1, device=numbers.device) * _signed(GOLDEN)

    def row(self, row: int) -> Float64[Tensor, "B W K"]:
        """Return the noise along a row."""
        positions = row * self.width + torch.arange(self.width, device=self.keys.device)
        bits = _mix(_fold(self.keys[:, None], positions)[:, :, None] + self.entries)
        uniform = ((bits >> 12) & (2**52 - 1)).double().add_(0.5).mul_(2.0**-52)
        return uniform.log_().neg_().log_().neg_()


def _draw_cached(
    prior: Prior,
    codes: Tensor,
    coarser: Mapping[str, Tensor] | None,
    labels: Tensor | None,
    noise: Noise,
    choice: Choice,
    given_rows: int,
    on_row: Callable[[int], None],
) -> None:
    captured = codes.is_cuda
    cache = CachedPrior(prior, batch=len(codes), coarser=coarser, labels=labels, static=captured)
    current = torch.zeros_like(codes[:, 0])
    noises = torch.empty(*current.shape, prior.entries, dtype=torch.float64, device=codes.device)
    targets, sources = current.unbind(1), noises.unbind(1)

    def step(column: int) -> None:
        targets[column].copy_(choice(cache.step(column), sources[column]))
        cache.absorb(targets[column], column)

    replay: Callable[[int], None] | None = None
    for row in range(prior.height):
        cache.start_row(row)
        if row < given_rows:
            current.copy_(codes[:, row])
            for column in range(prior.width):
                cache.step(column)
                cache.absorb(targets[column], column)
        else:
            noises.copy_(noise.row(row))
            # The first row drawn runs uncaptured, which warms the libraries up; capturing itself changes no buffer.
            for column in range(prior.width):
                (replay or step)(column)
            if captured and replay is None and row + 1 < prior.height:
                replay = _capture(step, prior.width)
            codes[:, row] = current
        on_row(row + 1)


def _draw_naive(
    prior: Prior,
    codes: Tensor,
    coarser: Mapping[str, Tensor] | None,
    labels: Tensor | None,
    noise: Noise,
    choice: Choice,
    given_rows: int,
    on_row: Callable[[int], None],
) -> None:
    for row in range(prior.height):
        noises = noise.row(row)
        for column in range(prior.width if row >= given_rows else 0):
            logits = prior(codes, coarser, labels)[:, :, row, column]
            codes[:, row, column] = choice(logits, noises[:, column])
        on_row(row + 1)


def _capture(step: Callable[[int], None], columns: int) -> Callable[[int], None]:
    """Record the step at each column as a CUDA graph: a step is dozens of kernels too small to launch one by one."""
    graphs = [torch.cuda.CUDAGraph() for _ in range(columns)]
    for column, graph in enumerate(graphs):
        with torch.cuda.graph(graph, pool=graphs[0].pool() if column else None):
            step(column)
    return lambda column: graphs[column].replay()


def _check_given(prior: Prior, given: Tensor | None, given_rows: int, batch: int) -> None:
    if not 0 <= given_rows <= prior.height:
        raise ValueError(f"given_rows is {given_rows}; use 0 to {prior.height}, the rows of the grid")
    if given_rows and given is None:
        raise ValueError(f"given_rows is {given_rows} and there are no codes; give codes to complete, or 0 rows")
    if given is not None and given.shape != (batch, prior.height, prior.width):
        found, allowed = (" x ".join(map(str, shape)) for shape in (given.shape, (batch, prior.height, prior.width)))
        raise ValueError(f"the given codes are {found}; give {allowed}, of which only the given rows are read")


def _signed(value: int) -> int:
    """The 64-bit integer of torch with the same bits."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def _fold(key: Tensor, value: Tensor) -> Tensor:
    """Derive a key from a key and a number."""
    return _mix(key + (value + 1) * _signed(GOLDEN))


def _mix(x: Tensor) -> Tensor:
    """Scramble 64 bits (the finalizer of SplitMix64). torch shifts signed numbers, hence the masks."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & (2**33 - 1))
