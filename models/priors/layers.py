"""Layers of the priors: a convolution that is causal in raster order, and a gated residual block.

B grids, H x W positions, C channels. Features have the layout (B, H, W, C): a 1x1 convolution is a linear layer, and
attention reads the positions as a sequence without a copy.
Source: Chen et al. 2018 (PixelSNAIL), gated residual layer; van den Oord et al. 2016 (Gated PixelCNN), two stacks.
"""

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from models.config import PriorConfig
from models.recompute import RecomputableBlock


class RasterConv(nn.Module):
    """Convolution over the first `taps` positions, in raster order, of a window whose last row is the position's row.

    The window is `kernel` columns wide, centred on the position, and `rows` rows high. With `rows=1` it ends at the
    position. Only the weights of these taps are stored, so no mask has to keep the others at zero. The grid is padded
    with zeros.
    """

    def __init__(self, inputs: int, outputs: int, *, rows: int, kernel: int, taps: int) -> None:
        super().__init__()
        self.rows = rows
        self.side = kernel // 2  # columns left of a position
        self.columns = kernel if rows > 1 else self.side + 1
        bound = (inputs * taps) ** -0.5  # as in nn.Conv2d, with the fan-in of the stored taps
        self.weight = nn.Parameter(torch.empty(outputs, inputs, taps).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(outputs))

    @property
    def padding(self) -> tuple[int, int]:
        """Columns of zeros left and right of a row."""
        return self.side, self.columns - 1 - self.side

    @property
    def kernel(self) -> Float[Tensor, "outputs inputs rows columns"]:
        """Dense kernel: the stored taps, then zeros."""
        outputs, inputs, taps = self.weight.shape
        dense = F.pad(self.weight, (0, self.rows * self.columns - taps))
        return dense.view(outputs, inputs, self.rows, self.columns)

    def forward(self, x: Float[Tensor, "B H W inputs"]) -> Float[Tensor, "B H W outputs"]:
        padded = F.pad(x, (0, 0, *self.padding, self.rows - 1, 0))
        return F.conv2d(padded.permute(0, 3, 1, 2), self.kernel, self.bias).permute(0, 2, 3, 1)


def causal(inputs: int, outputs: int, kernel: int, *, strict: bool = False) -> RasterConv:
    """Build a convolution over the rows above and the row up to the position (kernel 5: 13 taps).

    The strict one excludes the position itself.
    """
    above = kernel // 2
    current = kernel // 2 + 1 - strict
    return RasterConv(inputs, outputs, rows=above + 1, kernel=kernel, taps=above * kernel + current)


def vertical(inputs: int, outputs: int, kernel: int, *, strict: bool = False) -> RasterConv:
    """Build a convolution over the rows above and the whole current row (kernel 5: 15 taps).

    The strict one excludes the current row.
    """
    above = kernel // 2
    return RasterConv(inputs, outputs, rows=above + 1, kernel=kernel, taps=(above + 1 - strict) * kernel)


def horizontal(inputs: int, outputs: int, kernel: int, *, strict: bool = False) -> RasterConv:
    """Build a convolution over the current row up to the position (kernel 5: 3 taps).

    The strict one excludes the position itself.
    """
    return RasterConv(inputs, outputs, rows=1, kernel=kernel, taps=kernel // 2 + 1 - strict)


NO_LABEL = -1  # in place of a label


def embed_labels(embedding: nn.Embedding, labels: Int64[Tensor, " B"]) -> Float[Tensor, "B C"]:
    """Embed labels. The vector of NO_LABEL is zero."""
    return embedding(labels.clamp(min=0)) * (labels != NO_LABEL)[:, None]


def elu(x: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """Compute ELU so that its backward pass needs the output only, which the next layer keeps anyway.

    That of F.elu keeps the input as well, and computes all exponentials again.
    """
    return F.elu(x.clone(), inplace=True)


def dropout(x: Float[Tensor, "*axes"], probability: float, training: bool) -> Float[Tensor, "*axes"]:
    """Apply dropout; on CPUs with 16 random bits per element, so `probability` is a multiple of 2^-16 there.

    F.dropout draws a number per element on CPUs, and takes twice as long in all.
    """
    if not training or not probability:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():  # fused into one kernel
        return F.dropout(x, probability)
    integers = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)  # 64 random bits each
    bits = integers.view(torch.int16)[: x.numel()].view(x.shape)  # uniform from -2^15 on
    threshold = min(round(probability * 2**16), 2**16 - 1) - 2**15  # at most the largest int16
    return x * ((bits >= threshold) / (1 - probability)).to(x.dtype)


First = TypeVar("First", RasterConv, nn.Linear)


class BlockStyle(NamedTuple):
    """Settings that all gated blocks of a prior share."""

    dropout: float = 0.0  # probability
    dropout_place: str = "inside"
    gate: str = "sigmoid"

    @classmethod
    def of(cls, config: PriorConfig) -> "BlockStyle":
        """Return the style of a prior's blocks."""
        return cls(config.dropout, config.dropout_place, config.gate)


def tanh_gate(gates: Float[Tensor, "*B C2"]) -> Float[Tensor, "*B C"]:
    """Gate of Gated PixelCNN (van den Oord et al. 2016, equation 2): tanh(a) * sigmoid(b)."""
    values, openings = gates.chunk(2, -1)
    return values.tanh() * openings.sigmoid()


GATES: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": F.glu, "tanh": tanh_gate}


class GatedBlock(RecomputableBlock, Generic[First]):
    """Gated residual block: x + a * sigmoid(b), or with the gate "tanh" x + tanh(a) * sigmoid(b).

    (a, b) are the output of two layers, the second of which is 1x1. An auxiliary stream (PixelSNAIL's term) is added
    between them. Coarser codes and the label are added to (a, b) before the gate.
    """

    def __init__(
        self,
        channels: int,
        first: First,
        style: BlockStyle,
        *,
        auxiliary: int = 0,
        condition: int = 0,
        classes: int = 0,
    ) -> None:
        """`auxiliary` and `condition` are the channels of these streams, 0 for none."""
        super().__init__()
        hidden = first.weight.shape[0]
        self.first: First = first
        self.second = nn.Linear(hidden, 2 * channels)
        self.auxiliary = nn.Linear(auxiliary, hidden, bias=False) if auxiliary else None
        self.condition = nn.Linear(condition, 2 * channels, bias=False) if condition else None
        self.label = nn.Embedding(classes, 2 * channels) if classes else None
        self.gate = GATES[style.gate]
        self.dropout = style.dropout if style.dropout_place == "inside" else 0.0
        self.dropout_after = style.dropout if style.dropout_place == "after" else 0.0
        # Small weights: each block starts close to the identity, so a deep network starts close to a shallow one.
        nn.init.zeros_(self.second.bias)
        with torch.no_grad():
            self.second.weight.mul_(0.1)
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=0.02)

    def forward(
        self,
        x: Float[Tensor, "B H W C"],
        auxiliary: Float[Tensor, "B H W A"] | None = None,
        condition: Float[Tensor, "B H W D"] | None = None,
        labels: Int64[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B H W C"]:
        hidden = self.first(elu(x))
        if self.auxiliary is not None and auxiliary is not None:
            hidden = hidden + self.auxiliary(elu(auxiliary))
        gates = self.second(dropout(elu(hidden), self.dropout, self.training))
        if self.condition is not None:
            gates = gates + self.condition(condition)
        if self.label is not None and labels is not None:
            gates = gates + embed_labels(self.label, labels)[:, None, None]
        return dropout(x + self.gate(gates), self.dropout_after, self.training)
