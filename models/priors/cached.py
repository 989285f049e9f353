"""Incremental inference of a prior: KV cache for attention, row caches for convolutions.

Everything that depends only on finished rows, coarser codes and the label is computed once per row, in products as
large as those of training. A step then computes only the taps on its own row. Buffers keep their addresses, and views
of each column are made once: a step is little more than matrix products, and can be captured as a CUDA graph.

B grids, H x W positions, C channels, K codebook entries, L = 1 + H x W keys, head_dim = C / heads.
Source: Ramachandran et al. 2017 (Fast PixelCNN++), after Paine et al. 2016 (Fast WaveNet).
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from models.priors.attention import StrictAttention
from models.priors.base import Prior, VerticalStack
from models.priors.layers import GatedBlock, RasterConv, embed_labels


class CachedPrior:
    """Incremental version of a `Prior`: it computes the logits of each position, in raster order, before its code.

    For each batch of grids call `reset`; for each row `start_row`; for each column of the row `step`, and then `append`
    with the chosen codes. Dropout is off, and the weights are those at construction. With `static` all shapes are the
    same in every step, as a CUDA graph requires: attention computes all L keys under a mask.
    """

    def __init__(self, prior: Prior, *, batch: int, static: bool = False) -> None:
        width = prior.width
        self.batch = batch
        self.compute_condition = prior.condition
        self.condition: Tensor | None = None  # (B, H, W, C)
        self.embedding = prior.embedding.weight
        self.position_embedding = prior.position(prior.positions)  # (H, W, C)
        self.stem = _Stem(prior.stem, batch, width)
        self.vertical = None if prior.vertical is None else _Vertical(prior.vertical, batch, width)
        self.blocks: list[tuple[_ConvBlock, _Attention | None]] = []
        for index, block in enumerate(prior.blocks):
            attention = prior.attention_after(index)
            cached = None if attention is None else _Attention(attention, prior.positions, batch, static)
            self.blocks.append((_ConvBlock(block, batch, width), cached))
        self.output = [_PointwiseBlock(block) for block in prior.output]
        self.head, self.head_bias = transposed(prior.head), prior.head.bias

    def reset(self, coarser: Mapping[str, Int64[Tensor, "B _ _"]] | None, labels: Int64[Tensor, " B"] | None) -> None:
        """Clear the caches and set the coarser codes and labels of the next grids."""
        self.condition = self.compute_condition(coarser)
        self.stem.rows.clear()
        if self.vertical is not None:
            self.vertical.reset(labels)
        for block, attention in self.blocks:
            block.reset(labels)
            if attention is not None:
                attention.reset()

    def start_row(self, row: int) -> None:
        """Compute what all positions of a row share. The row above must be complete."""
        condition = None if self.condition is None else self.condition[:, row]
        auxiliaries: list[Tensor | None] = [None] * len(self.blocks)
        if self.vertical is not None:
            auxiliaries = self.vertical.row(self.stem.rows.current, condition)
        self.stem.start_row(self.position_embedding[row])
        for (block, attention), auxiliary in zip(self.blocks, auxiliaries, strict=True):
            block.start_row(auxiliary, condition)
            if attention is not None:
                attention.start_row(row)

    def step(self, column: int) -> Float[Tensor, "B K"]:
        """Compute the logits at a column of the current row."""
        x = self.stem.step(column)
        for block, attention in self.blocks:
            x = block.step(x, column)
            if attention is not None:
                x = attention.step(x, column)
        for output_block in self.output:
            x = output_block.step(x)
        return torch.addmm(self.head_bias, F.elu(x), self.head)

    def append(self, codes: Int64[Tensor, " B"], column: int) -> None:
        """Add the codes of the column of the last `step` to the caches."""
        code_embedding = F.embedding(codes, self.embedding)
        self.stem.inputs[column].copy_(code_embedding)
        for _, attention in self.blocks:
            if attention is not None:
                attention.append(code_embedding, column)


class _Rows:
    """Input rows of a convolution, the current one last, padded with zeros left and right."""

    def __init__(self, conv: RasterConv, batch: int, width: int) -> None:
        left, right = conv.padding
        self.padded = conv.weight.new_zeros(batch, conv.rows, left + width + right, conv.weight.shape[1])
        self.current = self.padded[:, -1, left : left + width]  # (B, W, inputs), a view

    def clear(self) -> None:
        """Set all rows to zero, like rows above the grid."""
        self.padded.zero_()

    def roll(self) -> None:
        """Move each row up by one. The current row keeps its values until they are overwritten."""
        for row in range(self.padded.shape[1] - 1):
            self.padded[:, row].copy_(self.padded[:, row + 1])


class _IncrementalConv:
    """Raster convolution, one position at a time: the rows above once per row, the current row's taps in each step."""

    def __init__(self, conv: RasterConv, batch: int, width: int) -> None:
        outputs, inputs, taps = conv.weight.shape
        current_taps = taps - (conv.rows - 1) * conv.columns
        self.rows = _Rows(conv, batch, width)
        self.kernel_above = conv.kernel[:, :, :-1].clone()
        self.bias = conv.bias
        # The taps of the current row as one matrix, (taps x inputs, outputs): a step is one product.
        weight = conv.weight[:, :, -current_taps:]
        self.weight = weight.permute(2, 1, 0).reshape(current_taps * inputs, outputs).contiguous()
        self.row_sum = conv.weight.new_zeros(batch, width, outputs)  # bias, rows above, auxiliary and position terms
        # Views of each column: written inputs, windows of inputs under the taps, and row sums.
        self.inputs = self.rows.current.unbind(1)
        self.windows = [self.rows.padded[:, -1, column : column + current_taps].flatten(1) for column in range(width)]
        self.row_sums = self.row_sum.unbind(1)

    def start_row(self, addend: Tensor | None) -> None:
        """Compute the row sums. `addend` is added to the convolution's output."""
        self.rows.roll()
        self.row_sum.copy_(self.bias if addend is None else self.bias + addend)
        if self.kernel_above.shape[2]:
            self.row_sum.add_(_convolve(self.rows.padded[:, :-1], self.kernel_above))


class _Stem(_IncrementalConv):
    """Strict convolution over the embedded codes."""

    def step(self, column: int) -> Tensor:
        return torch.addmm(self.row_sums[column], self.windows[column], self.weight)


class _ConvBlock:
    """Gated block around a raster convolution."""

    def __init__(self, block: GatedBlock[RasterConv], batch: int, width: int) -> None:
        self.conv = _IncrementalConv(block.first, batch, width)
        self.auxiliary = block.auxiliary
        self.gate_bias = _GateBias(block)
        self.second, self.gate = transposed(block.second), block.gate
        self.row_gate_bias = self.second.new_zeros(batch, width, self.second.shape[1])  # of the current row
        conv = self.conv
        self.columns = list(zip(conv.inputs, conv.row_sums, conv.windows, self.row_gate_bias.unbind(1), strict=True))

    def reset(self, labels: Tensor | None) -> None:
        self.conv.rows.clear()
        self.gate_bias.reset(labels)

    def start_row(self, auxiliary: Tensor | None, condition: Tensor | None) -> None:
        projected = None if self.auxiliary is None or auxiliary is None else self.auxiliary(F.elu(auxiliary))
        self.conv.start_row(projected)
        self.row_gate_bias.copy_(self.gate_bias.row(condition))

    def step(self, x: Tensor, column: int) -> Tensor:
        inputs, row_sum, window, gate_bias = self.columns[column]
        inputs.copy_(F.elu(x))
        hidden = torch.addmm(row_sum, window, self.conv.weight)
        return x + self.gate(torch.addmm(gate_bias, F.elu(hidden), self.second))


class _PointwiseBlock:
    """Gated block around a 1x1 layer. It needs no cache."""

    def __init__(self, block: GatedBlock[nn.Linear]) -> None:
        self.first, self.first_bias = transposed(block.first), block.first.bias
        self.second, self.second_bias = transposed(block.second), block.second.bias
        self.gate = block.gate
        self.auxiliary = None if block.auxiliary is None else transposed(block.auxiliary)

    def step(self, x: Tensor, auxiliary: Tensor | None = None) -> Tensor:
        bias: Tensor = self.first_bias
        if self.auxiliary is not None and auxiliary is not None:
            bias = torch.addmm(bias, F.elu(auxiliary), self.auxiliary)
        hidden = torch.addmm(bias, F.elu(x), self.first)
        return x + self.gate(torch.addmm(self.second_bias, F.elu(hidden), self.second))


class _GateBias:
    """Sum that a block adds before its gate, for one row: bias, label and coarser codes."""

    def __init__(self, block: GatedBlock) -> None:
        self.second_bias, self.label, self.condition = block.second.bias, block.label, block.condition
        self.bias: Tensor = self.second_bias

    def reset(self, labels: Tensor | None) -> None:
        if self.label is not None and labels is not None:
            self.bias = (self.second_bias + embed_labels(self.label, labels))[:, None]

    def row(self, condition: Tensor | None) -> Tensor:
        return self.bias if self.condition is None or condition is None else self.bias + self.condition(condition)


class _Vertical:
    """Vertical stack, one row at a time: it never reads the current row."""

    def __init__(self, stack: VerticalStack, batch: int, width: int) -> None:
        self.stem, self.stem_kernel = stack.stem, stack.stem.kernel
        self.stem_rows = _Rows(stack.stem, batch, width)
        self.blocks = [
            (block, block.first.kernel, _Rows(block.first, batch, width), _GateBias(block)) for block in stack.blocks
        ]

    def reset(self, labels: Tensor | None) -> None:
        self.stem_rows.clear()
        for _, _, rows, gate_bias in self.blocks:
            rows.clear()
            gate_bias.reset(labels)

    def row(self, code_embedding: Tensor, condition: Tensor | None) -> list[Tensor | None]:
        """Return the features after each block. `code_embedding`, (B, W, C), is that of the row above."""
        self.stem_rows.current.copy_(code_embedding)
        self.stem_rows.roll()
        x = _convolve(self.stem_rows.padded, self.stem_kernel) + self.stem.bias
        outputs: list[Tensor | None] = []
        for block, kernel, rows, gate_bias in self.blocks:
            rows.roll()
            rows.current.copy_(F.elu(x))
            hidden = F.elu(_convolve(rows.padded, kernel) + block.first.bias)
            x = x + block.gate(F.linear(hidden, block.second.weight) + gate_bias.row(condition))
            outputs.append(x)
        return outputs


class _Attention:
    """Strict attention, one position at a time, over cached keys and values of earlier positions."""

    def __init__(self, attention: StrictAttention, positions: Tensor, batch: int, static: bool) -> None:
        channels = attention.query.weight.shape[0]
        head_dim = channels // attention.heads
        length = positions.shape[0] * positions.shape[1] + 1
        self.heads = attention.heads
        self.query_block, self.key_block = _PointwiseBlock(attention.query_block), _PointwiseBlock(attention.key_block)
        self.merge = _PointwiseBlock(attention.merge)
        self.query = transposed(attention.query) * head_dim**-0.5  # with the scale of the scores
        self.key_value = transposed(attention.key_value)
        self.code_projection = transposed(attention.code_projection)
        # Embeddings of all positions, (H, W, C), and of the current row, (W, C).
        self.query_positions = attention.query_position(positions)
        self.key_positions = attention.key_position(positions)
        self.row_query_position = torch.zeros_like(self.query_positions[0])
        self.row_key_position = torch.zeros_like(self.key_positions[0])
        # (2, B, heads, head_dim, 1 + H*W), keys and values; slot 0 is the null key. Slots are the innermost axis: both
        # products of a step run along it.
        self.kv_cache = self.query.new_zeros(2, batch, self.heads, head_dim, length)
        self.keys, self.values = self.kv_cache.flatten(1, 2)  # (B x heads, head_dim, L) each, views
        self.static = static
        self.cache_len = 1  # filled slots, without `static`
        # With `static`, the length lives on the device as mask and index: fixed shapes and addresses.
        self.mask = self.query.new_empty(length)  # 0 visible, -inf hidden
        self.write_index = torch.ones(1, dtype=torch.int64, device=self.query.device)
        self.features: Tensor  # (B, C), input of the last `step`, from which `append` computes the key and the value

    def reset(self) -> None:
        self.kv_cache.zero_()
        self.cache_len = 1
        self.mask.fill_(-torch.inf)
        self.mask[0] = 0
        self.write_index.fill_(1)

    def start_row(self, row: int) -> None:
        self.row_query_position.copy_(self.query_positions[row])
        self.row_key_position.copy_(self.key_positions[row])

    def step(self, x: Tensor, column: int) -> Tensor:
        self.features = x
        queries = torch.mm(self.query_block.step(x + self.row_query_position[column]), self.query)
        queries = queries.view(self.keys.shape[0], 1, -1)  # (B x heads, 1, head_dim)
        # softmax(Q K^T) V, over the filled slots or under the mask.
        if not self.static:
            weights = torch.softmax(torch.bmm(queries, self.keys[:, :, : self.cache_len]), -1)
            attended = torch.bmm(self.values[:, :, : self.cache_len], weights.transpose(1, 2))
        else:
            weights = torch.softmax(torch.bmm(queries, self.keys) + self.mask, -1)
            attended = torch.bmm(self.values, weights.transpose(1, 2))
        return self.merge.step(x, attended.view(x.shape))

    def append(self, code_embedding: Tensor, column: int) -> None:
        """Add the key and value of the position of the last step, whose code is now chosen."""
        position_and_code = torch.addmm(self.row_key_position[column], code_embedding, self.code_projection)
        key_value = torch.mm(self.key_block.step(self.features + position_and_code), self.key_value)
        key_value = key_value.view(key_value.shape[0], 2, self.heads, -1).transpose(0, 1)  # (2, B, heads, head_dim)
        if not self.static:
            self.kv_cache[..., self.cache_len].copy_(key_value)
            self.cache_len += 1
        else:
            self.kv_cache.index_copy_(-1, self.write_index, key_value.unsqueeze(-1))
            self.mask.index_fill_(0, self.write_index, 0)
            self.write_index.add_(1)


def transposed(layer: nn.Linear) -> Tensor:
    """Return a linear layer's weight as a contiguous matrix of (inputs, outputs), the layout of a step's products."""
    return layer.weight.t().contiguous()


def _convolve(rows: Tensor, kernel: Tensor) -> Tensor:
    """Convolve padded rows, (B, rows, columns, inputs), to one row, (B, W, outputs)."""
    return F.conv2d(rows.permute(0, 3, 1, 2), kernel).permute(0, 2, 3, 1).squeeze(1)
