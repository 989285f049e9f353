"""PixelSNAIL: one stack of causal convolutions, and attention for what lies beyond their reach.

A single stack never sees some codes to the upper right; attention sees all of them, so have some.
Source: Chen et al. 2018; Razavi et al. 2019, section 3.2 (the top prior).
"""

from collections.abc import Mapping

from models.config import PriorConfig
from models.priors.base import Prior
from models.priors.conditioning import Grid
from models.priors.layers import causal


class PixelSNAIL(Prior):
    """Each block sees the rows above and its own row up to the position."""

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
            stem=causal(channels, channels, kernel, strict=True),
            convolutions=[causal(channels, hidden, kernel) for _ in range(config.layers)],
        )
