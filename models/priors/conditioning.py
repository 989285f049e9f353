"""Conditioning stack: one feature map, at a prior's grid, from the codes of all coarser levels.

B grids, H x W positions, C channels.
Source: Razavi et al. 2019, section 3.2 (residual conditioning stack).
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from models.residual import ResidualBlock

# Codes, or continuous latents (models/priors/density.py).
Grids = Int64[Tensor, "B _ _"] | Float[Tensor, "B _ _ _"]


class Grid(NamedTuple):
    """Size of a level's grid of codes, and the number of its codebook's entries."""

    entries: int
    height: int
    width: int


class ConditioningStack(nn.Module):
    """Network from the codes of every coarser level to features at the grid of the conditioned level.

    Embedded codes are upsampled to the finest of the coarser grids, concatenated, and passed through residual blocks. A
    transposed convolution then upsamples to the conditioned grid. Nothing here is causal: all coarser codes are drawn
    before the first code of this level. Raises ValueError for incompatible grids.
    """

    def __init__(self, coarser: Mapping[str, Grid], height: int, width: int, channels: int, hidden: int, blocks: int):
        super().__init__()
        *_, (finest_name, finest_grid) = coarser.items()
        for name, grid in coarser.items():
            _factor(name, grid, finest_grid.height, finest_grid.width)
        factor = _factor(finest_name, finest_grid, height, width)
        if factor % 2:
            raise ValueError(
                f"the grid must be larger than that of {finest_name}, {finest_grid.height} x {finest_grid.width}, by "
                f"an even factor, got {height} x {width}"
            )
        self.finest_size = finest_grid.height, finest_grid.width
        # The prefix avoids the names of ModuleDict's own attributes.
        self.embeddings = nn.ModuleDict(
            {f"level_{name}": nn.Embedding(grid.entries, channels) for name, grid in coarser.items()}
        )
        self.levels = tuple(coarser)
        self.join = nn.Conv2d(len(coarser) * channels, channels, 3, padding=1)
        self.blocks = nn.ModuleList(ResidualBlock(channels, hidden) for _ in range(blocks))
        # kernel 2f, stride f, padding f / 2: each side grows by exactly f, which must be even.
        self.lift = nn.ConvTranspose2d(channels, channels, 2 * factor, stride=factor, padding=factor // 2)

    def forward(self, coarser: Mapping[str, Grids]) -> Float[Tensor, "B H W C"]:
        maps = [
            F.interpolate(embedding(coarser[name]).permute(0, 3, 1, 2), self.finest_size)
            for name, embedding in zip(self.levels, self.embeddings.values(), strict=True)
        ]
        x = self.join(torch.cat(maps, 1))
        for block in self.blocks:
            x = block(x)
        return self.lift(F.relu(x)).permute(0, 2, 3, 1).contiguous()


def _factor(name: str, grid: Grid, height: int, width: int) -> int:
    """Return the integer upsampling factor from `grid`. Raises ValueError if there is none."""
    if height % grid.height or width % grid.width or height // grid.height != width // grid.width:
        raise ValueError(
            f"the grid must be larger than that of {name}, {grid.height} x {grid.width}, by one integer factor along "
            f"both sides, got {height} x {width}; list levels coarse to fine"
        )
    return height // grid.height
