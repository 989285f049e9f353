"""The same priors one position at a time: what earlier positions have in common is kept, not computed again.

What finished rows, coarser codes and the label give is computed a row at a time, in products as large as training's;
a position is left with its own row's few taps. Buffers keep their addresses and every column's view of them is made
once, so a step is little but matrix products, and can be captured as a CUDA graph.
B grids, H x W positions, C channels, R hidden channels, K entries.
Source: Ramachandran et al. 2017 (Fast PixelCNN++), after Paine et al. 2016 (Fast WaveNet).
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from models.priors.attention import StrictAttention
from models.priors.base import Prior, VerticalStack
from models.priors.layers import GatedBlock, RasterConv


class CachedPrior:
    """A prior that is given its codes in raster order, and scores each position before its code is known.

    For each batch of grids: `begin`; for each row: `start_row`; then for each of its columns: `step`, and `absorb`
    once the code is chosen. Dropout is off, and the weights are those of the moment it is built. `static` keeps all
    shapes the same from step to step, as a CUDA graph needs: attention then covers the whole grid under a mask that
    opens as positions are absorbed.
    """

    def __init__(self, prior: Prior, *, batch: int, static: bool = False) -> None:
        width = prior.width
        self.batch = batch
        self.condition_of = prior.condition
        self.condition: Tensor | None = None
        self.embedding = prior.embedding.weight
        self.places = prior.position(prior.positions)
        self.stem = _Stem(prior.stem, batch, width)
        self.vertical = None if prior.vertical is None else _Vertical(prior.vertical, batch, width)
        self.blocks: list[tuple[_ConvBlock, _Attention | None]] = []
        for i, block in enumerate(prior.blocks):
            attention = prior.attention_after(i)
            cached = None if attention is None else _Attention(attention, prior.positions, batch, static)
            self.blocks.append((_ConvBlock(block, batch, width), cached))
        self.output = [_PointBlock(block) for block in prior.output]
        self.head, self.head_bias = _packed(prior.head), prior.head.bias

    def begin(self, coarser: Mapping[str, Int64[Tensor, "B _ _"]] | None, labels: Int64[Tensor, " B"] | None) -> None:
        """Forget the grids so far, and take in what the next ones are drawn under."""
        self.condition = self.condition_of(coarser)
        self.stem.rows.clear()
        if self.vertical is not None:
            self.vertical.begin(labels)
        for block, attention in self.blocks:
            block.begin(labels)
            if attention is not None:
                attention.begin()

    def start_row(self, row: int) -> None:
        """Compute what the positions of a row have in common; the row above it must be complete."""
        condition = None if self.condition is None else self.condition[:, row]
        asides: list[Tensor | None] = [None] * len(self.blocks)
        if self.vertical is not None:
            asides = self.vertical.row(self.stem.rows.own, condition)
        self.stem.start_row(self.places[row])
        for (block, attention), aside in zip(self.blocks, asides, strict=True):
            block.start_row(aside, condition)
            if attention is not None:
                attention.start_row(row)

    def step(self, column: int) -> Float[Tensor, "B K"]:
        """Score every entry at a column of the current row."""
        x = self.stem.step(column)
        for block, attention in self.blocks:
            x = block.step(x, column)
            if attention is not None:
                x = attention.step(x, column)
        for point in self.output:
            x = point.step(x)
        return torch.addmm(self.head_bias, F.elu(x), self.head)

    def absorb(self, codes: Int64[Tensor, " B"], column: int) -> None:
        """Take in the codes of the column that was scored last."""
        raw = F.embedding(codes, self.embedding)
        self.stem.writes[column].copy_(raw)
        for _, attention in self.blocks:
            if attention is not None:
                attention.absorb(raw, column)


class _Rows:
    """The rows that a convolution looks at, the current one last, with the zeros left and right of them."""

    def __init__(self, conv: RasterConv, batch: int, width: int) -> None:
        left, right = conv.padding
        self.all = conv.weight.new_zeros(batch, conv.rows, left + width + right, conv.weight.shape[1])
        self.own = self.all[:, -1, left : left + width]

    def clear(self) -> None:
        """Make every row one above the grid."""
        self.all.zero_()

    def roll(self) -> None:
        """Make the current row the one above. Its place keeps the old content until it is written."""
        for row in range(self.all.shape[1] - 1):
            self.all[:, row].copy_(self.all[:, row + 1])


class _Taps:
    """A raster convolution, a position at a time: the taps above once per row, those of the own row at each step."""

    def __init__(self, conv: RasterConv, batch: int, width: int) -> None:
        outputs, inputs, taps = conv.weight.shape
        own = taps - (conv.rows - 1) * conv.columns
        self.rows = _Rows(conv, batch, width)
        self.above = conv.kernel[:, :, :-1].clone()
        self.bias = conv.bias
        self.weight = conv.weight[:, :, -own:].permute(2, 1, 0).reshape(own * inputs, outputs).contiguous()
        self.before = conv.weight.new_zeros(batch, width, outputs)
        self.writes = self.rows.own.unbind(1)
        self.reads = [self.rows.all[:, -1, column : column + own].flatten(1) for column in range(width)]
        self.befores = self.before.unbind(1)

    def start_row(self, extra: Tensor | None) -> None:
        """`extra` is what else is added to the convolution along this row."""
        self.rows.roll()
        self.before.copy_(self.bias if extra is None else self.bias + extra)
        if self.above.shape[2]:
            self.before.add_(_convolve(self.rows.all[:, :-1], self.above))


class _Stem(_Taps):
    """The strict convolution over the codes themselves."""

    def step(self, column: int) -> Tensor:
        return torch.addmm(self.befores[column], self.reads[column], self.weight)


class _ConvBlock:
    """A gated block around a raster convolution."""

    def __init__(self, block: GatedBlock[RasterConv], batch: int, width: int) -> None:
        self.taps = _Taps(block.first, batch, width)
        self.aside = block.aside
        self.gate = _Gate(block)
        self.second = _packed(block.second)
        self.gates = self.second.new_zeros(batch, width, self.second.shape[1])
        self.columns = list(
            zip(self.taps.writes, self.taps.befores, self.taps.reads, self.gates.unbind(1), strict=True)
        )

    def begin(self, labels: Tensor | None) -> None:
        self.taps.rows.clear()
        self.gate.begin(labels)

    def start_row(self, aside: Tensor | None, condition: Tensor | None) -> None:
        self.taps.start_row(None if self.aside is None or aside is None else self.aside(F.elu(aside)))
        self.gates.copy_(self.gate.row(condition))

    def step(self, x: Tensor, column: int) -> Tensor:
        write, before, read, gates = self.columns[column]
        write.copy_(F.elu(x))
        hidden = torch.addmm(before, read, self.taps.weight)
        return x + F.glu(torch.addmm(gates, F.elu(hidden), self.second), -1)


class _PointBlock:
    """A gated block around a 1x1 layer, which needs no cache."""

    def __init__(self, block: GatedBlock[nn.Linear]) -> None:
        self.first, self.first_bias = _packed(block.first), block.first.bias
        self.second, self.second_bias = _packed(block.second), block.second.bias
        self.aside = None if block.aside is None else _packed(block.aside)

    def step(self, x: Tensor, aside: Tensor | None = None) -> Tensor:
        before: Tensor = self.first_bias
        if self.aside is not None and aside is not None:
            before = torch.addmm(before, F.elu(aside), self.aside)
        hidden = torch.addmm(before, F.elu(x), self.first)
        return x + F.glu(torch.addmm(self.second_bias, F.elu(hidden), self.second), -1)


class _Gate:
    """What enters a block before its gate, along a row: the bias, the label's, and the coarser codes'."""

    def __init__(self, block: GatedBlock) -> None:
        self.own, self.label, self.condition = block.second.bias, block.label, block.condition
        self.bias: Tensor = self.own

    def begin(self, labels: Tensor | None) -> None:
        if self.label is not None and labels is not None:
            self.bias = (self.own + self.label(labels))[:, None]

    def row(self, condition: Tensor | None) -> Tensor:
        return self.bias if self.condition is None or condition is None else self.bias + self.condition(condition)


class _Vertical:
    """The vertical stack, a row at a time: it never looks into the row that is being drawn."""

    def __init__(self, stack: VerticalStack, batch: int, width: int) -> None:
        self.stem, self.stem_kernel = stack.stem, stack.stem.kernel
        self.stem_rows = _Rows(stack.stem, batch, width)
        self.blocks = [
            (block, block.first.kernel, _Rows(block.first, batch, width), _Gate(block)) for block in stack.blocks
        ]

    def begin(self, labels: Tensor | None) -> None:
        self.stem_rows.clear()
        for _, _, rows, gate in self.blocks:
            rows.clear()
            gate.begin(labels)

    def row(self, raw: Tensor, condition: Tensor | None) -> list[Tensor | None]:
        """Return the features after each block; `raw` are the embedded codes of the row above."""
        self.stem_rows.own.copy_(raw)
        self.stem_rows.roll()
        x = _convolve(self.stem_rows.all, self.stem_kernel) + self.stem.bias
        after: list[Tensor | None] = []
        for block, kernel, rows, gate in self.blocks:
            rows.roll()
            rows.own.copy_(F.elu(x))
            hidden = F.elu(_convolve(rows.all, kernel) + block.first.bias)
            x = x + F.glu(F.linear(hidden, block.second.weight) + gate.row(condition), -1)
            after.append(x)
        return after


class _Attention:
    """Strict attention, a position at a time, over the keys and values of those before it."""

    def __init__(self, attention: StrictAttention, positions: Tensor, batch: int, static: bool) -> None:
        channels = attention.query.weight.shape[0]
        width = channels // attention.heads
        length = positions.shape[0] * positions.shape[1] + 1  # entry 0 stands for "nothing"
        self.heads = attention.heads
        self.query_block, self.key_block = _PointBlock(attention.query_block), _PointBlock(attention.key_block)
        self.merge = _PointBlock(attention.merge)
        self.query = _packed(attention.query) * width**-0.5
        self.key_value, self.raw = _packed(attention.key_value), _packed(attention.raw)
        self.query_places = attention.query_position(positions)
        self.key_places = attention.key_position(positions)
        self.query_place = torch.zeros_like(self.query_places[0])
        self.key_place = torch.zeros_like(self.key_places[0])
        # The positions lie innermost: both products of a step then run along them.
        self.kept = self.query.new_zeros(2, batch, self.heads, width, length)
        self.keys, self.values = self.kept.flatten(1, 2)
        self.seen = 1
        self.static = static
        self.open = self.query.new_empty(length)
        self.next = torch.ones(1, dtype=torch.int64, device=self.query.device)

    def begin(self) -> None:
        self.kept.zero_()
        self.seen = 1
        self.open.fill_(-torch.inf)
        self.open[0] = 0
        self.next.fill_(1)

    def start_row(self, row: int) -> None:
        self.query_place.copy_(self.query_places[row])
        self.key_place.copy_(self.key_places[row])

    def step(self, x: Tensor, column: int) -> Tensor:
        self.features = x
        queries = torch.mm(self.query_block.step(x + self.query_place[column]), self.query)
        queries = queries.view(self.keys.shape[0], 1, -1)
        if not self.static:
            weights = torch.softmax(torch.bmm(queries, self.keys[:, :, : self.seen]), -1)
            mixed = torch.bmm(self.values[:, :, : self.seen], weights.transpose(1, 2))
        else:
            weights = torch.softmax(torch.bmm(queries, self.keys) + self.open, -1)
            mixed = torch.bmm(self.values, weights.transpose(1, 2))
        return self.merge.step(x, mixed.view(x.shape))

    def absorb(self, raw: Tensor, column: int) -> None:
        seen = self.features + torch.addmm(self.key_place[column], raw, self.raw)
        new = torch.mm(self.key_block.step(seen), self.key_value)
        new = new.view(new.shape[0], 2, self.heads, -1).transpose(0, 1)
        if not self.static:
            self.kept[..., self.seen].copy_(new)
            self.seen += 1
        else:
            self.kept.index_copy_(-1, self.next, new.unsqueeze(-1))
            self.open.index_fill_(0, self.next, 0)
            self.next.add_(1)


def _packed(layer: nn.Linear) -> Tensor:
    """The weight as a step multiplies with it: inputs x outputs, contiguous."""
    return layer.weight.t().contiguous()


def _convolve(rows: Tensor, kernel: Tensor) -> Tensor:
    """Convolve padded rows, (B, rows, columns, inputs), down to one row, (B, W, outputs)."""
    return F.conv2d(rows.permute(0, 3, 1, 2), kernel).permute(0, 2, 3, 1).squeeze(1)
