"""Strict causal attention: a position attends to all earlier positions, never to itself.

B grids, H x W positions, N = H x W positions in raster order, C channels, head_dim = C / heads.
Keys and values contain the code of their own position: a position that attended to itself would read the code to
predict.
Source: Chen et al. 2018 (PixelSNAIL), attention block.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.priors.layers import BlockStyle, GatedBlock, dropout


class StrictAttention(nn.Module):
    """Multi-head attention over the features of earlier positions.

    Key 0 is a null key with a value of zeros, the only one that the first position sees.
    Dropout of "columns" zeroes the value of a position for all queries of a head, which drops columns of the attention
    matrix. The paper drops single "logits" and public code drops single "weights". Both need the whole matrix in memory
    on devices whose fused kernel has no dropout, such as CPUs. Columns can be dropped before the kernel.
    """

    def __init__(self, channels: int, heads: int, style: BlockStyle, *, dropout_of: str = "columns") -> None:
        super().__init__()
        self.heads = heads
        self.dropout, self.dropout_of = style.dropout, dropout_of
        self.code_projection = nn.Linear(channels, channels, bias=False)
        self.query_position = nn.Linear(2, channels, bias=False)
        self.key_position = nn.Linear(2, channels, bias=False)
        self.query_block = GatedBlock(channels, nn.Linear(channels, channels), style)
        self.key_block = GatedBlock(channels, nn.Linear(channels, channels), style)
        self.query = nn.Linear(channels, channels, bias=False)
        self.key_value = nn.Linear(channels, 2 * channels, bias=False)
        self.merge = GatedBlock(channels, nn.Linear(channels, channels), style, auxiliary=channels)

    def split(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B heads N head_dim"]:
        """Split the channels into heads."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(
        self,
        x: Float[Tensor, "B H W C"],
        code_embedding: Float[Tensor, "B H W C"],
        positions: Float[Tensor, "H W 2"],
    ) -> Float[Tensor, "B H W C"]:
        """Add values of earlier positions to the features. Keys and values depend on their position's code."""
        queries = self.query(self.query_block(x + self.query_position(positions)))
        key_features = self.key_block(x + self.code_projection(code_embedding) + self.key_position(positions))
        # Shift keys and values by one position and put the null key first. The fused kernel's causal mask, which lets a
        # position see itself, then lets it see only earlier positions.
        shifted = F.pad(self.key_value(key_features).flatten(1, 2)[:, :-1], (0, 0, 1, 0))
        keys, values = (self.split(half) for half in shifted.chunk(2, -1))
        split_queries = self.split(queries.flatten(1, 2))
        if self.training and self.dropout and self.dropout_of != "columns":
            attended = self._attend_with_dropout(split_queries, keys, values)
        else:
            if self.training and self.dropout:
                values = values * dropout(torch.ones_like(values[..., :1]), self.dropout, True)
            attended = F.scaled_dot_product_attention(split_queries, keys, values, is_causal=True)
        return self.merge(x, attended.transpose(1, 2).reshape(x.shape))

    def _attend_with_dropout(
        self,
        queries: Float[Tensor, "B heads N head_dim"],
        keys: Float[Tensor, "B heads N head_dim"],
        values: Float[Tensor, "B heads N head_dim"],
    ) -> Float[Tensor, "B heads N head_dim"]:
        """Attend with dropout of single logits or weights of the attention matrix, which this holds in memory."""
        logits = queries @ keys.transpose(2, 3) * queries.shape[-1] ** -0.5
        if self.dropout_of == "logits":
            logits = dropout(logits, self.dropout, True)
        hidden = torch.ones(logits.shape[2:], dtype=torch.bool, device=logits.device).triu(1)
        weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
        return (dropout(weights, self.dropout, True) if self.dropout_of == "weights" else weights) @ values
