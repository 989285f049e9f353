"""Gated PixelCNN: a vertical stack for the rows above and a horizontal stack for the current row, without a blind spot.

Source: van den Oord et al. 2016; Razavi et al. 2019, section 3.2 (priors of the lower levels).
"""

from models.priors.base import Prior
from models.priors.layers import horizontal


class PixelCNN(Prior):
    """Prior whose blocks see the current row up to the position and, through the vertical stack, the rows above."""

    two_stacks = True
    convolution = staticmethod(horizontal)
