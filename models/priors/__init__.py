"""The priors there are, by name: a name is the file that holds it."""

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
    """Build the prior of a level of `grid` (height, width) under `coarser` ones, coarse to fine; 0 classes: no labels.

    Raises ValueError for an unknown name, for sizes that hold nothing and for grids that do not fit into one another.
    """
    if config.name not in PRIORS:
        raise ValueError(f"the prior's name is {config.name}; use one of {', '.join(PRIORS)}")
    for level, (size, height, width) in {"the prior": Grid(entries, *grid), **coarser}.items():
        if min(size, height, width) < 1:
            raise ValueError(
                f"the grid of {level} is {height} x {width} codes of {size} entries; use 1 or more of each"
            )
    if classes < 0:
        raise ValueError(f"classes is {classes}; use the number of classes, or 0 for a prior without labels")
    return PRIORS[config.name](config, entries=entries, grid=grid, coarser=coarser, classes=classes)
