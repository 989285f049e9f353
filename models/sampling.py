"""Draw codes from a prior, in raster order, the same ones whoever draws them.

A code is the entry with the largest log-probability plus Gumbel noise, which picks each entry with its probability.
The noise is a function of (seed, sample number, grid, position, entry) and of nothing else: SplitMix64, keyed by the
first four and counted by the last. So batch size, device and sampler do not change a sample, as far as the logits
they compute agree: two entries must lie within the logits' rounding, some 1e-6, for the choice to differ. Products
are therefore kept in the weights' own precision while drawing, single or double.
B grids, H x W positions, K entries.
Source: Steele et al. 2014 (SplitMix64); Maddison et al. 2014 (Gumbel-max).
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from models.priors import Prior
from models.priors.cached import CachedPrior

GOLDEN = 0x9E3779B97F4A7C15
METHODS = ("cached", "naive")


class Choice(NamedTuple):
    """How a code is chosen from the logits: divided by `temperature`, of the `top_k` and `top_p` likeliest only."""

    temperature: float = 1.0
    top_k: int = 0  # entries; 0 keeps all
    top_p: float = 1.0  # of the probability, at least one entry; 1 keeps all

    def check(self) -> None:
        """Raise ValueError for a setting that means nothing."""
        if not 0 < self.temperature < math.inf:
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


class _Grids(NamedTuple):
    """A batch of grids to be drawn, and what they are drawn under."""

    codes: Int64[Tensor, "B H W"]  # filled in place, below the given rows
    coarser: Mapping[str, Int64[Tensor, "B _ _"]]
    labels: Int64[Tensor, " B"] | None
    noise: "Noise"
    given_rows: int


class Sampler:
    """Draws grids of codes from a prior, and keeps its caches, and on CUDA its captured step, from draw to draw.

    At most `batch_size` grids are drawn at once, which bounds the memory and changes nothing else. Naive runs the whole
    network for each code. Build another sampler once the prior's weights have changed.
    """

    def __init__(
        self,
        prior: Prior,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        method: Literal["cached", "naive"] = "cached",
        batch_size: int = 256,
    ) -> None:
        self.prior, self.method, self.batch_size = prior, method, batch_size
        self.choice = Choice(temperature, top_k, top_p)
        self.choice.check()
        if method not in METHODS:
            raise ValueError(f"method is {method!r}; use {' or '.join(METHODS)}")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; use 1 or more grids at once")
        if prior.head.weight.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"the prior's weights are {prior.head.weight.dtype}, too rough for caches and network to agree; "
                "use torch.float32, such as prior.float()"
            )
        self._cached: _Cached | None = None

    def draw(
        self,
        *,
        seed: int,
        numbers: Int64[Tensor, " B"],
        coarser: Mapping[str, Int64[Tensor, "B _ _"]] | None = None,
        labels: Int64[Tensor, " B"] | None = None,
        given: Int64[Tensor, "B H W"] | None = None,
        given_rows: int = 0,
    ) -> Int64[Tensor, "B H W"]:
        """Draw one grid of codes for each sample number; the uppermost `given_rows` rows are those of `given`."""
        prior = self.prior
        _check_numbers(numbers)
        _check_given(prior, given, given_rows, len(numbers))
        device = prior.positions.device
        codes = torch.zeros(len(numbers), prior.height, prior.width, dtype=torch.int64, device=device)
        if given is not None:
            codes[:, :given_rows] = given[:, :given_rows]
        prior.check(codes, coarser, labels)
        training = prior.training
        prior.eval()
        try:
            with torch.inference_mode(), _exact(device):
                for first in range(0, len(numbers), self.batch_size):
                    part = slice(first, first + self.batch_size)
                    self._fill(
                        _Grids(
                            codes[part],
                            {name: grids[part] for name, grids in (coarser or {}).items()},
                            None if labels is None else labels[part],
                            Noise(seed, numbers[part].to(device), prior),
                            given_rows,
                        )
                    )
        finally:
            prior.train(training)
        return codes

    def _fill(self, grids: _Grids) -> None:
        if self.method == "naive":
            _fill_naive(self.prior, self.choice, grids)
            return
        if self._cached is None or self._cached.cache.batch != len(grids.codes):
            self._cached = None  # its memory serves the next one
            self._cached = _Cached(self.prior, len(grids.codes), self.choice)
        self._cached.fill(grids)


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
    batch_size: int = 256,
    given: Int64[Tensor, "B H W"] | None = None,
    given_rows: int = 0,
) -> Int64[Tensor, "B H W"]:
    """Draw one grid of codes for each sample number, once: see `Sampler`, which can draw again."""
    sampler = Sampler(prior, temperature=temperature, top_k=top_k, top_p=top_p, method=method, batch_size=batch_size)
    return sampler.draw(
        seed=seed,
        numbers=numbers,
        coarser=coarser,
        labels=labels,
        given=given,
        given_rows=given_rows,
    )


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


class _Cached:
    """The cached sampler of one batch size: its buffers, and on CUDA its step at each column as a graph."""

    def __init__(self, prior: Prior, batch: int, choice: Choice) -> None:
        self.choice, self.height, self.width = choice, prior.height, prior.width
        device = prior.positions.device
        self.captured = device.type == "cuda"
        self.cache = CachedPrior(prior, batch=batch, static=self.captured)
        self.current = torch.zeros(batch, prior.width, dtype=torch.int64, device=device)
        self.noises = torch.empty(batch, prior.width, prior.entries, dtype=torch.float64, device=device)
        self.targets, self.sources = self.current.unbind(1), self.noises.unbind(1)
        self.replay: Callable[[int], None] | None = None

    def fill(self, grids: _Grids) -> None:
        self.cache.begin(grids.coarser, grids.labels)
        for row in range(self.height):
            self.cache.start_row(row)
            if row < grids.given_rows:
                self.current.copy_(grids.codes[:, row])
                for column in range(self.width):
                    self.cache.step(column)
                    self.cache.absorb(self.targets[column], column)
            else:
                self.noises.copy_(grids.noise.row(row))
                for column in range(self.width):
                    (self.replay or self.step)(column)
                # The first row drawn ran uncaptured, which warms the libraries up; capturing changes no buffer.
                if self.captured and self.replay is None:
                    self.replay = _capture(self.step, self.width)
                grids.codes[:, row] = self.current

    def step(self, column: int) -> None:
        self.targets[column].copy_(self.choice(self.cache.step(column), self.sources[column]))
        self.cache.absorb(self.targets[column], column)


def _fill_naive(prior: Prior, choice: Choice, grids: _Grids) -> None:
    codes = grids.codes
    for row in range(grids.given_rows, prior.height):
        noises = grids.noise.row(row)
        for column in range(prior.width):
            logits = prior(codes, grids.coarser, grids.labels)[:, :, row, column]
            codes[:, row, column] = choice(logits, noises[:, column])


@contextmanager
def _exact(device: torch.device) -> Iterator[None]:
    """Compute in the weights' own precision, whatever the caller's: without autocast, and on CUDA without TF32.

    Either would round the logits so roughly that caches and network part, and batches with them.
    """
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        cudnn: Any = torch.backends.cudnn
        # The switches had other names before torch 2.9.
        name, off, convolution = (
            ("fp32_precision", "ieee", cudnn.conv) if hasattr(cudnn, "conv") else ("allow_tf32", False, cudnn)
        )
        switches = (torch.backends.cuda.matmul, convolution)
        before = [getattr(switch, name) for switch in switches]
        try:
            for switch in switches:
                setattr(switch, name, off)
            yield
        finally:
            for switch, found in zip(switches, before, strict=True):
                setattr(switch, name, found)


def _capture(step: Callable[[int], None], columns: int) -> Callable[[int], None]:
    """Record the step at each column as a CUDA graph: a step is dozens of kernels too small to launch one by one."""
    graphs = [torch.cuda.CUDAGraph() for _ in range(columns)]
    for column, graph in enumerate(graphs):
        with torch.cuda.graph(graph, pool=graphs[0].pool() if column else None):
            step(column)
    return lambda column: graphs[column].replay()


def _check_numbers(numbers: Tensor) -> None:
    if numbers.ndim != 1 or numbers.dtype != torch.int64:
        raise ValueError(
            f"sample numbers are {numbers.dtype} of shape {tuple(numbers.shape)}; "
            "use torch.int64, one for each grid, such as torch.arange(8)"
        )


def _check_given(prior: Prior, given: Tensor | None, given_rows: int, batch: int) -> None:
    if not 0 <= given_rows <= prior.height:
        raise ValueError(f"given_rows is {given_rows}; use 0 to {prior.height}, the rows of the grid")
    if given_rows and given is None:
        raise ValueError(f"given_rows is {given_rows} and there are no codes; give codes to complete, or 0 rows")
    if given is not None and given.shape != (batch, prior.height, prior.width):
        found, allowed = (" x ".join(map(str, shape)) for shape in (given.shape, (batch, prior.height, prior.width)))
        raise ValueError(f"the given codes are {found}; give {allowed}, of which only the given rows are read")
    if given is not None and given.dtype != torch.int64:
        raise ValueError(f"the given codes are {given.dtype}; use torch.int64, such as codes.long()")


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
