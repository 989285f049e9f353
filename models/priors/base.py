"""Prior: an autoregressive distribution over one level's codes, in raster order.

p(codes | coarser codes, label) = product over positions of p(code | earlier codes, coarser codes, label).
B grids, H x W positions, K codebook entries, C channels.
Source: Razavi et al. 2019, section 3.2 and algorithm 2.

To add a prior, write a subclass of `Prior` in a file of this package, and add its name to `PRIORS` in `__init__.py`
and to `PriorConfig.name` in models/config.py.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from models.config import PriorConfig
from models.precision import autocast_disabled
from models.priors.attention import StrictAttention
from models.priors.conditioning import ConditioningStack, Grid, Grids
from models.priors.layers import NO_LABEL, BlockStyle, GatedBlock, RasterConv, elu, vertical


class VerticalStack(nn.Module):
    """Stack of convolutions over the rows above each position, at all columns.

    One stack of causal convolutions has a blind spot at the upper right; two stacks have none.
    """

    blocks: Sequence[GatedBlock[RasterConv]]

    def __init__(self, config: PriorConfig, *, condition: int, classes: int) -> None:
        super().__init__()
        self.stem = vertical(config.channels, config.channels, config.kernel_size, strict=True)
        self.blocks = nn.ModuleList(  # type: ignore[assignment]
            GatedBlock(
                config.channels,
                vertical(config.channels, config.residual_channels, config.kernel_size),
                BlockStyle.of(config),
                condition=condition,
                classes=classes,
            )
            for _ in range(config.layers)
        )

    def forward(
        self,
        code_embedding: Float[Tensor, "B H W C"],
        condition: Float[Tensor, "B H W C"] | None,
        labels: Int64[Tensor, " B"] | None,
    ) -> list[Float[Tensor, "B H W C"]]:
        """Return the features after each block."""
        x, outputs = self.stem(code_embedding), []
        for block in self.blocks:
            x = block(x, None, condition, labels)
            outputs.append(x)
        return outputs


class Prior(nn.Module):
    """Base class of the priors. A subclass defines what its convolutions see.

    Embedded codes pass a strict convolution (the stem), then `layers` gated blocks with attention after some of them,
    then a stack of 1x1 blocks and a linear layer to logits.
    """

    two_stacks: ClassVar[bool] = False  # True adds a vertical stack that feeds each block
    positions: Tensor
    # Types of the elements of the module lists, which torch does not declare.
    blocks: Sequence[GatedBlock[RasterConv]]
    attentions: Sequence[StrictAttention]
    output: Sequence[GatedBlock[nn.Linear]]

    @staticmethod
    def convolution(inputs: int, outputs: int, kernel: int, *, strict: bool = False) -> RasterConv:
        """Build one convolution. The strict one excludes its own position, as it reads the codes to predict."""
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
        channels, hidden, kernel = config.channels, config.residual_channels, config.kernel_size
        style = BlockStyle.of(config)
        self.entries, self.classes, self.label_dropout = entries, classes, config.label_dropout
        self.height, self.width = grid
        self.coarser = dict(coarser)
        self.attention_every = config.layers // config.attention_layers if config.attention_layers else 0
        conditioned = bool(coarser) and config.conditioned
        condition = channels if conditioned else 0

        self.embedding = nn.Embedding(entries, channels)
        self.conditioning = (
            ConditioningStack(coarser, *grid, channels, hidden, config.condition_layers) if conditioned else None
        )
        self.stem = self.convolution(channels, channels, kernel, strict=True)
        self.position = nn.Linear(2, channels, bias=False)
        self.vertical = VerticalStack(config, condition=condition, classes=classes) if self.two_stacks else None
        self.blocks = nn.ModuleList(  # type: ignore[assignment]
            GatedBlock(
                channels,
                self.convolution(channels, hidden, kernel),
                style,
                auxiliary=channels if self.two_stacks else 0,
                condition=condition,
                classes=classes,
            )
            for _ in range(config.layers)
        )
        self.attentions = nn.ModuleList(  # type: ignore[assignment]
            StrictAttention(channels, config.attention_heads, style, dropout_of=config.attention_dropout)
            for _ in range(config.attention_layers)
        )
        self.output = nn.ModuleList(  # type: ignore[assignment]
            GatedBlock(channels, nn.Linear(channels, hidden), style) for _ in range(config.output_layers)
        )
        self.head = nn.Linear(channels, entries)
        # Small weights: an untrained prior gives every entry nearly the same probability.
        nn.init.normal_(self.head.weight, std=0.1 * channels**-0.5)
        nn.init.zeros_(self.head.bias)
        # Coordinates of the positions, from -1/2 to 1/2 along each axis: (H, W, 2).
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
        """Compute the logits of every entry at every position, from the earlier codes in raster order.

        In training, a fraction `label_dropout` of the grids loses its label. Raises ValueError for inputs that do not
        fit this prior (see `check`).
        """
        self.check(codes, coarser, labels)
        if labels is not None and self.training and self.label_dropout:
            dropped = torch.rand(len(labels), device=labels.device) < self.label_dropout
            labels = labels.masked_fill(dropped, NO_LABEL)
        return self.score(codes, self.condition(coarser), labels)

    @property
    def can_be_guided(self) -> bool:
        """True for a prior that was trained with and without labels, as classifier-free guidance needs."""
        return self.classes > 0 and self.label_dropout > 0

    def condition(self, coarser: Mapping[str, Grids] | None) -> Float[Tensor, "B H W C"] | None:
        """Compute the feature map that conditions every block; None for the coarsest level and without conditioning."""
        return None if self.conditioning is None else self.conditioning(coarser or {})

    def score(
        self,
        codes: Grids,
        condition: Float[Tensor, "B H W C"] | None,
        labels: Int64[Tensor, " B"] | None,
    ) -> Float[Tensor, "B K H W"]:
        """Compute logits without checks, given the output of `condition`. `codes` may lack the last rows of grids."""
        code_embedding, positions = self.embedding(codes), self.positions[: codes.shape[1]]
        # Features of the rows above, one per block.
        auxiliaries = (
            [None] * len(self.blocks) if self.vertical is None else self.vertical(code_embedding, condition, labels)
        )
        x = self.stem(code_embedding) + self.position(positions)
        for index, (block, auxiliary) in enumerate(zip(self.blocks, auxiliaries, strict=True)):
            x = block(x, auxiliary, condition, labels)
            attention = self.attention_after(index)
            if attention is not None:
                x = attention(x, code_embedding, positions)
        for output_block in self.output:
            x = output_block(x)
        with autocast_disabled(x.device.type):
            return self.head(elu(x).to(self.head.weight.dtype)).permute(0, 3, 1, 2)

    def attention_after(self, block: int) -> StrictAttention | None:
        """Return the attention that follows a block, if any."""
        if not self.attention_every or (block + 1) % self.attention_every:
            return None
        return self.attentions[block // self.attention_every]

    def check(
        self,
        codes: Tensor,
        coarser: Mapping[str, Tensor] | None,
        labels: Tensor | None,
    ) -> None:
        """Raise ValueError for codes or labels of a shape, dtype or range that this prior was not built for."""
        if torch.compiler.is_compiling():  # reading values would break the graph
            return
        _check_codes("codes", codes, Grid(self.entries, self.height, self.width))
        coarser = coarser or {}
        if coarser.keys() != self.coarser.keys():
            raise ValueError(
                f"coarser must have the levels {_names(self.coarser)}, got {_names(coarser)}; use these codes exactly"
            )
        for name, grid in self.coarser.items():
            _check_codes(f"codes of {name}", coarser[name], grid)
            _check_count(f"codes of {name}", coarser[name], codes)
        if self.classes and labels is None:
            raise ValueError(f"labels must be one per grid, of {self.classes} classes, got none")
        if not self.classes and labels is not None:
            raise ValueError("labels must be None for a prior without classes, got labels")
        if labels is None:
            return
        if labels.ndim != 1 or labels.dtype != torch.int64:
            raise ValueError(
                f"labels must be torch.int64 of one axis, got {labels.dtype} of shape {tuple(labels.shape)}"
            )
        _check_count("labels", labels, codes)
        _check_range("labels", labels, self.classes, first=NO_LABEL if self.label_dropout else 0)


def nll(logits: Float[Tensor, "B K H W"], codes: Int64[Tensor, "B H W"]) -> Float[Tensor, " B"]:
    """Compute the negative log-likelihood of each grid of codes, summed over positions, in nats."""
    batch, entries = logits.shape[:2]
    rows = logits.permute(0, 2, 3, 1).reshape(-1, entries)  # (B x H x W, K)
    rows = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
    return F.cross_entropy(rows, codes.flatten(), reduction="none").view(batch, -1).sum(1)


def _check_codes(name: str, codes: Tensor, grid: Grid) -> None:
    if codes.dtype != torch.int64:
        raise ValueError(f"{name} must be torch.int64, got {codes.dtype}")
    if codes.shape[1:] != (grid.height, grid.width):
        size = " x ".join(map(str, codes.shape[1:]))
        raise ValueError(f"{name} must be grids of {grid.height} x {grid.width}, as this prior was built, got {size}")
    _check_range(name, codes, grid.entries)


def _check_range(name: str, numbers: Tensor, stop: int, first: int = 0) -> None:
    if numbers.numel() and not numbers.is_meta:
        low, high = int(numbers.min()), int(numbers.max())
        if low < first or high >= stop:
            raise ValueError(f"{name} must be {first} to {stop - 1}, got {low} to {high}")


def _check_count(name: str, numbers: Tensor, codes: Tensor) -> None:
    if len(numbers) != len(codes):
        raise ValueError(f"{name} must be of {len(codes)} grids, got {len(numbers)}")


def _names(levels: Mapping[str, object]) -> str:
    return ", ".join(levels) or "none"
