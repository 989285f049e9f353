"""PixelSNAIL: one stack of causal convolutions, and attention for positions beyond their receptive field.

A single stack has a blind spot at the upper right. Attention covers it, so use at least one attention layer.
Source: Chen et al. 2018; Razavi et al. 2019, section 3.2 (top prior).
"""

from models.priors.base import Prior
from models.priors.layers import causal


class PixelSNAIL(Prior):
    """Prior whose blocks see the rows above and the current row up to the position."""

    convolution = staticmethod(causal)
