"""A prior: a distribution over one level's codes, position by position in raster order.

p(codes | coarser codes, label) = the product over positions of p(code | codes before it, coarser codes, label).
B grids, H x W positions, K entries, C channels.
Source: Razavi et al. 2019, section 3.2 and algorithm 2.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from models.config import PriorConfig
from models.priors.attention import StrictAttention
from models.priors.conditioning import ConditioningStack, Grid
from models.priors.layers import GatedBlock, RasterConv, vertical


class VerticalStack(nn.Module):
    """Features of the rows above each position, of every column: what a causal kernel's widening cone would miss."""

    blocks: Sequence[GatedBlock[RasterConv]]

    def __init__(self, config: PriorConfig, *, condition: int, classes: int) -> None:
        super().__init__()
        self.stem = vertical(config.channels, config.channels, config.kernel_size, strict=True)
        self.blocks = nn.ModuleList(  # type: ignore[assignment]
            GatedBlock(
                config.channels,
                vertical(config.channels, config.residual_channels, config.kernel_size),
                dropout=config.dropout,
                condition=condition,
                classes=classes,
            )
            for _ in range(config.layers)
        )

    def forward(
        self,
        raw: Float[Tensor, "B H W C"],
        condition: Float[Tensor, "B H W C"] | None,
        labels: Int64[Tensor, " B"] | None,
    ) -> list[Float[Tensor, "B H W C"]]:
        """Return the features after each block."""
        x, after = self.stem(raw), []
        for block in self.blocks:
            x = block(x, None, condition, labels)
            after.append(x)
        return after


class Prior(nn.Module):
    """The network that the priors share; a subclass says what one of its convolutions sees.

    Embedded codes pass a strict stem and `layers` gated blocks with attention among them, then a 1x1 output stack.
    """

    two_stacks: ClassVar[bool] = False  # whether a vertical stack stands beside the convolutions
    positions: Tensor
    # torch's lists of modules do not say what they hold; these lines do, for the type checker.
    blocks: Sequence[GatedBlock[RasterConv]]
    attentions: Sequence[StrictAttention]
    output: Sequence[GatedBlock[nn.Linear]]

    @staticmethod
    def convolution(inputs: int, outputs: int, kernel: int, *, strict: bool = False) -> RasterConv:
        """Build one convolution; the strict one, which reads the codes themselves, does not see its own position."""
        raise NotImplementedError

    def __init__(
        self,
        config: PriorConfig,
        *,
        entries: int,
        grid: tuple[int, int],
        coarser: Mapping[str, Grid],
        classes: int,
    ) -> None:
        super().__init__()
        channels, hidden, kernel, dropout = (
            config.channels,
            config.residual_channels,
            config.kernel_size,
            config.dropout,
        )
        self.entries, self.classes = entries, classes
        self.height, self.width = grid
        self.coarser = dict(coarser)
        self.attention_every = config.layers // config.attention_layers if config.attention_layers else 0
        condition = channels if coarser else 0

        self.embedding = nn.Embedding(entries, channels)
        self.conditioning = (
            ConditioningStack(coarser, *grid, channels, hidden, config.condition_layers) if coarser else None
        )
        self.stem = self.convolution(channels, channels, kernel, strict=True)
        self.position = nn.Linear(2, channels, bias=False)
        self.vertical = VerticalStack(config, condition=condition, classes=classes) if self.two_stacks else None
        self.blocks = nn.ModuleList(  # type: ignore[assignment]
            GatedBlock(
                channels,
                self.convolution(channels, hidden, kernel),
                dropout=dropout,
                aside=channels if self.two_stacks else 0,
                condition=condition,
                classes=classes,
            )
            for _ in range(config.layers)
        )
        self.attentions = nn.ModuleList(  # type: ignore[assignment]
            StrictAttention(channels, config.attention_heads, dropout=dropout) for _ in range(config.attention_layers)
        )
        self.output = nn.ModuleList(  # type: ignore[assignment]
            GatedBlock(channels, nn.Linear(channels, hidden), dropout=dropout) for _ in range(config.output_layers)
        )
        self.head = nn.Linear(channels, entries)
        # An untrained prior holds every entry about equally likely.
        nn.init.normal_(self.head.weight, std=0.1 * channels**-0.5)
        nn.init.zeros_(self.head.bias)
        rows = (torch.arange(self.height) - self.height / 2) / self.height
        columns = (torch.arange(self.width) - self.width / 2) / self.width
        positions = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1)
        self.register_buffer("positions", positions, persistent=False)

    def forward(
        self,
        codes: Int64[Tensor, "B H W"],
        coarser: Mapping[str, Int64[Tensor, "B _ _"]] | None = None,
        labels: Int64[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B K H W"]:
        """Score every entry at every position, each from the codes before it in raster order."""
        self.check(codes, coarser, labels)
        return self.score(codes, self.condition(coarser), labels)

    def condition(self, coarser: Mapping[str, Int64[Tensor, "B _ _"]] | None) -> Float[Tensor, "B H W C"] | None:
        """Turn coarser codes into the map that every block sees; None for the coarsest level."""
        return None if self.conditioning is None else self.conditioning(coarser or {})

    def score(
        self,
        codes: Int64[Tensor, "B H W"],
        condition: Float[Tensor, "B H W C"] | None,
        labels: Int64[Tensor, " B"] | None,
    ) -> Float[Tensor, "B K H W"]:
        """Score codes given the map of `condition`; the uppermost rows of a grid may stand alone."""
        raw, positions = self.embedding(codes), self.positions[: codes.shape[1]]
        asides = [None] * len(self.blocks) if self.vertical is None else self.vertical(raw, condition, labels)
        x = self.stem(raw) + self.position(positions)
        for i, (block, aside) in enumerate(zip(self.blocks, asides, strict=True)):
            x = block(x, aside, condition, labels)
            attention = self.attention_after(i)
            if attention is not None:
                x = attention(x, raw, positions)
        for point in self.output:
            x = point(x)
        with _full_precision(x.device.type):
            return self.head(F.elu(x).to(self.head.weight.dtype)).permute(0, 3, 1, 2)

    def attention_after(self, block: int) -> StrictAttention | None:
        """The attention that follows a block, if any does."""
        if not self.attention_every or (block + 1) % self.attention_every:
            return None
        return self.attentions[block // self.attention_every]

    def check(
        self,
        codes: Tensor,
        coarser: Mapping[str, Tensor] | None,
        labels: Tensor | None,
    ) -> None:
        """Raise ValueError for codes or labels that this prior was not built for."""
        if torch.compiler.is_compiling():  # reading values would break the graph
            return
        _check_codes("codes", codes, Grid(self.entries, self.height, self.width))
        given = dict(coarser or {})
        if set(given) != set(self.coarser):
            raise ValueError(
                f"the coarser levels given are {_names(given)}; give codes of exactly these: {_names(self.coarser)}"
            )
        for name, grid in self.coarser.items():
            _check_codes(f"codes of {name}", given[name], grid)
            _check_count(f"codes of {name}", given[name], codes)
        if self.classes and labels is None:
            raise ValueError(f"labels are missing; this prior knows {self.classes} classes, so give one label per grid")
        if not self.classes and labels is not None:
            raise ValueError("labels were given; this prior was trained without, so leave them out")
        if labels is None:
            return
        if labels.ndim != 1 or labels.dtype != torch.int64:
            raise ValueError(
                f"labels are {labels.dtype} of shape {tuple(labels.shape)}; use torch.int64, one number for each grid"
            )
        _check_count("labels", labels, codes)
        if labels.numel() and not labels.is_meta:
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= self.classes:
                raise ValueError(f"labels run from {low} to {high}; use 0 to {self.classes - 1}")


def nll(logits: Float[Tensor, "B K H W"], codes: Int64[Tensor, "B H W"]) -> Float[Tensor, " B"]:
    """Sum the negative log-likelihood of the codes over positions, in nats."""
    batch, entries = logits.shape[:2]
    rows = logits.permute(0, 2, 3, 1).reshape(-1, entries)
    rows = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
    return F.cross_entropy(rows, codes.flatten(), reduction="none").view(batch, -1).sum(1)


def _full_precision(device: str) -> AbstractContextManager[object]:
    available = torch.amp.is_autocast_available(device)  # not on the meta device
    return torch.autocast(device, enabled=False) if available else nullcontext()


def _check_codes(what: str, codes: Tensor, grid: Grid) -> None:
    if codes.dtype != torch.int64:
        raise ValueError(f"{what} are {codes.dtype}; use torch.int64")
    if codes.shape[1:] != (grid.height, grid.width):
        found = " x ".join(map(str, codes.shape[1:]))
        raise ValueError(f"{what} are {found}; this prior was built for grids of {grid.height} x {grid.width}")
    if codes.numel() and not codes.is_meta:
        low, high = int(codes.min()), int(codes.max())
        if low < 0 or high >= grid.entries:
            raise ValueError(f"{what} run from {low} to {high}; use 0 to {grid.entries - 1}")


def _check_count(what: str, given: Tensor, codes: Tensor) -> None:
    if len(given) != len(codes):
        raise ValueError(f"{what} are given for {len(given)} grids of {len(codes)}; give one for each")


def _names(levels: Mapping[str, object]) -> str:
    return ", ".join(levels) or "none"
