"""Gated PixelCNN: two stacks, one for the rows above and one for the own row, so that nothing in reach is missed.

Source: van den Oord et al. 2016; Razavi et al. 2019, section 3.2 (the lower levels' priors).
"""

from models.priors.base import Prior
from models.priors.layers import horizontal


class PixelCNN(Prior):
    """Each block sees its own row up to the position and, through a vertical stack, the rows above."""

    two_stacks = True
    convolution = staticmethod(horizontal)
