"""Batches of images and codes.

Axes: N images, H x W codes of a level.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

CodeGrids: TypeAlias = dict[str, np.ndarray]  # level -> (N, H, W) int64, coarse to fine


def slices(items: Any, size: int) -> Iterator[tuple[int, Any]]:
    """Yield the start and the items of each batch of a sequence."""
    return ((start, items[start : start + size]) for start in range(0, len(items), size))


def code_batches(grids: Mapping[str, Tensor], size: int) -> Iterator[dict[str, Tensor]]:
    """Yield the codes of `size` images at a time."""
    for start in range(0, len(next(iter(grids.values()))), size):
        yield {level: grid[start : start + size] for level, grid in grids.items()}


def concatenate(batches: Sequence[Mapping[str, Tensor]]) -> CodeGrids:
    """Concatenate the batches of each level as arrays in memory."""
    return {level: np.concatenate([batch[level].cpu().numpy() for batch in batches]) for level in batches[0]}
