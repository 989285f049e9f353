"""Strict causal attention: a position attends to every earlier one, never to itself.

Keys and values see the code of their own position, so a position that attended to itself would read its answer.
N = H x W positions in raster order, C channels.
Source: Chen et al. 2018 (PixelSNAIL), attention block.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.priors.layers import GatedBlock


class StrictAttention(nn.Module):
    """Mix into the features what earlier positions hold, by several heads.

    Position 0 of the keys is an entry of zeros that stands for "nothing": it is all that the first position sees.
    Dropout hides a position's value from all queries of a head at once, which drops columns of the attention matrix.
    That is ours: the paper drops single logits, and public code single weights. Either would need the whole matrix in
    memory where a device's fused kernel knows no dropout, as a CPU's; columns are dropped before the kernel runs.
    """

    def __init__(self, channels: int, heads: int, *, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.raw = nn.Linear(channels, channels, bias=False)
        self.query_position = nn.Linear(2, channels, bias=False)
        self.key_position = nn.Linear(2, channels, bias=False)
        self.query_block = GatedBlock(channels, nn.Linear(channels, channels), dropout=dropout)
        self.key_block = GatedBlock(channels, nn.Linear(channels, channels), dropout=dropout)
        self.query = nn.Linear(channels, channels, bias=False)
        self.key_value = nn.Linear(channels, 2 * channels, bias=False)
        self.merge = GatedBlock(channels, nn.Linear(channels, channels), dropout=dropout, aside=channels)

    def split(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B heads N width"]:
        """Give each head its part of the channels."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(
        self, x: Float[Tensor, "B H W C"], raw: Float[Tensor, "B H W C"], positions: Float[Tensor, "H W 2"]
    ) -> Float[Tensor, "B H W C"]:
        """`raw` is the embedding of the codes themselves."""
        queries = self.query(self.query_block(x + self.query_position(positions)))
        seen = self.key_block(x + self.raw(raw) + self.key_position(positions))
        # One step later, and zeros first: the causal mask of the fused kernel becomes the strict one.
        shifted = F.pad(self.key_value(seen).flatten(1, 2)[:, :-1], (0, 0, 1, 0))
        keys, values = (self.split(part) for part in shifted.chunk(2, -1))
        if self.training and self.dropout:
            values = values * F.dropout(torch.ones_like(values[..., :1]), self.dropout)
        mixed = F.scaled_dot_product_attention(self.split(queries.flatten(1, 2)), keys, values, is_causal=True)
        return self.merge(x, mixed.transpose(1, 2).reshape(x.shape))
