"""Pictures of scores: dark where codes are likely, bright where they are not.

Axes: N images, S x S pixels.
"""

import math
from collections.abc import Mapping

import matplotlib
import numpy as np

from models.priors import Grid
from stages.inference.scores import Scores

COLORMAP = "inferno"


def draw_heat_maps(scores: Scores, levels: Mapping[str, Grid]) -> dict[str, np.ndarray]:
    """Draw the scores of each level, then of all levels ("total"): name -> uint8 (N, S, S, 3).

    The scale is the same for every image: the middle colour stands for a code that is as probable as a uniform choice,
    the brightest for the square of that probability or less.
    """
    density = 0.0  # nats per pixel of uniform choices
    pictures = {}
    for level, grid in levels.items():
        uniform = math.log(grid.entries) / (scores.image_size / grid.height) ** 2
        pictures[level] = _colorize(scores.heat_maps([level]) / (2 * uniform))
        density += uniform
    return {**pictures, "total": _colorize(scores.heat_maps() / (2 * density))}


def _colorize(values: np.ndarray) -> np.ndarray:
    """Convert (N, S, S) numbers, clipped to 0 to 1, to colours, uint8 (N, S, S, 3)."""
    return matplotlib.colormaps[COLORMAP](np.clip(values, 0, 1), bytes=True)[..., :3]
