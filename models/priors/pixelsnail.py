"""PixelSNAIL: one stack of causal convolutions, and attention for what lies beyond their reach.

A single stack never sees some codes to the upper right; attention sees all of them, so have some.
Source: Chen et al. 2018; Razavi et al. 2019, section 3.2 (the top prior).
"""

from models.priors.base import Prior
from models.priors.layers import causal


class PixelSNAIL(Prior):
    """Each block sees the rows above and its own row up to the position."""

    convolution = staticmethod(causal)
