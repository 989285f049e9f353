"""Checks of codes, labels, thresholds and rows that a caller passes to a trained model.

Axes: N images, H x W codes of a level.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from models.priors import Grid

Labels: TypeAlias = "Sequence[str | int] | np.ndarray | None"  # one name or index of a class per image
Threshold: TypeAlias = "float | Mapping[str, float] | None"  # nats per code, for all levels or for each


def check_names(names: Sequence[str], argument: str) -> tuple[str, ...]:
    """Return names as a tuple. Raises ValueError for a single text, whose letters would count as names."""
    if isinstance(names, str):
        raise ValueError(f"{argument} must be a list of names, got {names!r}; use [{names!r}]")
    return tuple(names)


def check_prefix(names: Sequence[str], levels: Sequence[str]) -> list[str]:
    """Return the names of a prefix of levels. Raises ValueError if they are not the first ones, coarse to fine."""
    prefix = list(check_names(names, "levels"))
    if not prefix or prefix != list(levels)[: len(prefix)]:
        raise ValueError(f"levels must be the first ones of {', '.join(levels)}, got {_join(prefix)}")
    return prefix


def check_codes(codes: Mapping[str, Any], grids: Mapping[str, Grid], device: torch.device) -> dict[str, Tensor]:
    """Convert the codes of `grids`' levels to int64 on a device, coarse to fine.

    Raises ValueError if a level is missing or unknown, or codes do not fit its grid and codebook.
    """
    if codes.keys() != grids.keys():
        raise ValueError(f"codes must be of the levels {_join(list(grids))}, got {_join(list(codes))}")
    tensors = {level: _check_grid(level, codes[level], grid).to(device) for level, grid in grids.items()}
    counts = {level: len(tensor) for level, tensor in tensors.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"codes must be of the same number of images at every level, got {counts}")
    return tensors


def _check_grid(level: str, codes: Any, grid: Grid) -> Tensor:
    array = np.asarray(codes.cpu() if isinstance(codes, Tensor) else codes)
    if (
        array.dtype.kind not in "iu"
        or array.ndim != 3
        or array.shape[1:] != (grid.height, grid.width)
        or not len(array)
    ):
        raise ValueError(
            f"codes of {level} must be integers of shape (1 or more, {grid.height}, {grid.width}), "
            f"got {array.dtype} of shape {array.shape}"
        )
    if array.min() < 0 or array.max() >= grid.entries:
        raise ValueError(f"codes of {level} must be 0 to {grid.entries - 1}, got {array.min()} to {array.max()}")
    return torch.from_numpy(array.astype(np.int64))


def check_labels(labels: Labels, classes: Sequence[str], count: int, device: torch.device) -> Tensor | None:
    """Convert names or indices of classes to indices, (N,) int64. Raises ValueError for any that do not fit."""
    if labels is None:
        return None
    if not classes:
        raise ValueError("labels must be None for a model without classes, got labels")
    names = list(check_names(labels, "labels"))  # type: ignore[arg-type]
    if len(names) != count:
        raise ValueError(f"labels must be one per image, of which there are {count}, got {len(names)}")
    return torch.tensor([_label_index(name, classes) for name in names], device=device)


def _label_index(name: Any, classes: Sequence[str]) -> int:
    if isinstance(name, str) and name in classes:
        return classes.index(name)
    if isinstance(name, int | np.integer) and 0 <= name < len(classes):
        return int(name)
    raise ValueError(f"labels must be any of {', '.join(classes)}, or an index below {len(classes)}, got {name!r}")


def check_thresholds(threshold: Threshold, grids: Mapping[str, Grid]) -> Mapping[str, float]:
    """Return a threshold per level, in nats; by default ln K for K entries. Raises ValueError if one is missing."""
    if threshold is None:
        return {level: math.log(grid.entries) for level, grid in grids.items()}
    thresholds = threshold if isinstance(threshold, Mapping) else dict.fromkeys(grids, threshold)
    if thresholds.keys() != grids.keys() or any(math.isnan(nats) for nats in thresholds.values()):
        raise ValueError(f"threshold must be a number, or one for each of {', '.join(grids)}, got {threshold}")
    return {level: float(thresholds[level]) for level in grids}


def check_rows(fraction: float, grids: Mapping[str, Grid]) -> dict[str, int]:
    """Return a fraction of the rows of each level, rounded to rows of the coarsest one. Raises ValueError above 1."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"rows must be a fraction from 0 to 1, got {fraction}")
    coarsest = next(iter(grids.values())).height
    return {level: round(fraction * coarsest) * grid.height // coarsest for level, grid in grids.items()}


def _join(names: Sequence[Any]) -> str:
    return ", ".join(map(str, names)) or "none"
