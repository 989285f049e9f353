"""Registry of the priors: `PRIORS` maps a name to a class. A prior's name is that of its file in this package.

To add one, see base.py.
"""

from collections.abc import Mapping

from models.config import PriorConfig
from models.priors.base import Prior, nll
from models.priors.conditioning import Grid
from models.priors.pixelcnn import PixelCNN
from models.priors.pixelsnail import PixelSNAIL

__all__ = ["PRIORS", "Grid", "Prior", "build", "nll"]

PRIORS: dict[str, type[Prior]] = {"pixelsnail": PixelSNAIL, "pixelcnn": PixelCNN}


def build(
    config: PriorConfig, *, entries: int, grid: tuple[int, int], coarser: Mapping[str, Grid], classes: int
) -> Prior:
    """Build the prior of a level of `grid` (height, width), conditioned on `coarser` levels, coarse to fine.

    `classes` is the number of labels, 0 for a prior without labels. Raises ValueError for an unknown name, for sizes
    below 1, and for grids that are not multiples of each other.
    """
    if config.name not in PRIORS:
        raise ValueError(f"name must be one of {', '.join(PRIORS)}, got {config.name!r}")
    for level, (size, height, width) in {"the prior": Grid(entries, *grid), **coarser}.items():
        if min(size, height, width) < 1:
            raise ValueError(
                f"the grid of {level} must be 1 or more codes high and wide, of 1 or more entries, "
                f"got {height} x {width} codes of {size} entries"
            )
    if classes < 0:
        raise ValueError(f"classes must be 0 or more, got {classes}; 0 builds a prior without labels")
    return PRIORS[config.name](config, entries=entries, grid=grid, coarser=coarser, classes=classes)
