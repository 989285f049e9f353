"""Gated PixelCNN: two stacks, one for the rows above and one for the own row, so that nothing in reach is missed.

Source: van den Oord et al. 2016; Razavi et al. 2019, section 3.2 (the lower levels' priors).
"""

from collections.abc import Mapping

from models.config import PriorConfig
from models.priors.base import Prior
from models.priors.conditioning import Grid
from models.priors.layers import horizontal


class PixelCNN(Prior):
    """Each block sees its own row up to the position and, through a vertical stack, the rows above."""

    def __init__(
        self,
        config: PriorConfig,
        *,
        entries: int,
        grid: tuple[int, int],
        coarser: Mapping[str, Grid],
        classes: int,
    ) -> None:
        channels, hidden, kernel = config.channels, config.residual_channels, config.kernel
        super().__init__(
            config,
            entries=entries,
            grid=grid,
            coarser=coarser,
            classes=classes,
            stem=horizontal(channels, channels, kernel, strict=True),
            convolutions=[horizontal(channels, hidden, kernel) for _ in range(config.layers)],
            stacks=2,
        )
