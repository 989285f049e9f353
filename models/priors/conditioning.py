"""What a prior knows of the coarser levels: one map of features, at its own grid, from all of their codes.

Source: Razavi et al. 2019, section 3.2 (residual conditioning stack).
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn


class Grid(NamedTuple):
    """The codes of a level: how many entries to choose from, and at how many positions."""

    entries: int
    height: int
    width: int


class ResidualBlock(nn.Module):
    """Add to the features a 3x3 and a 1x1 convolution of them."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, hidden, 3, padding=1)
        self.second = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return x + self.second(F.relu(self.first(F.relu(x))))


class ConditioningStack(nn.Module):
    """Turn the codes of every coarser level into features at the grid of the level they condition.

    Levels are brought to the finest of them, joined, and run through residual blocks there; a transposed convolution
    then brings them to the conditioned grid. Nothing is causal here: coarser codes are all known.
    """

    def __init__(self, coarser: Mapping[str, Grid], height: int, width: int, channels: int, hidden: int, blocks: int):
        super().__init__()
        *_, (nearest, finest) = coarser.items()
        for name, grid in coarser.items():
            _factor(name, grid, finest.height, finest.width)
        factor = _factor(nearest, finest, height, width)
        if factor % 2:
            raise ValueError(
                f"the grid is {height} x {width} and that of {nearest} {finest.height} x {finest.width}; "
                "use a grid that is larger by an even factor"
            )
        self.size = finest.height, finest.width
        self.embeddings = nn.ModuleDict({name: nn.Embedding(grid.entries, channels) for name, grid in coarser.items()})
        self.join = nn.Conv2d(len(coarser) * channels, channels, 3, padding=1)
        self.blocks = nn.ModuleList(ResidualBlock(channels, hidden) for _ in range(blocks))
        self.lift = nn.ConvTranspose2d(channels, channels, 2 * factor, stride=factor, padding=factor // 2)

    def forward(self, coarser: Mapping[str, Int64[Tensor, "B _ _"]]) -> Float[Tensor, "B H W C"]:
        maps = [
            F.interpolate(embedding(coarser[name]).permute(0, 3, 1, 2), self.size)
            for name, embedding in self.embeddings.items()
        ]
        x = self.join(torch.cat(maps, 1))
        for block in self.blocks:
            x = block(x)
        return self.lift(F.relu(x)).permute(0, 2, 3, 1).contiguous()


def _factor(name: str, grid: Grid, height: int, width: int) -> int:
    if height % grid.height or width % grid.width or height // grid.height != width // grid.width:
        raise ValueError(
            f"the grid is {height} x {width} and that of {name} {grid.height} x {grid.width}; "
            "use grids that are larger by one whole factor along both sides, coarse to fine"
        )
    return height // grid.height
