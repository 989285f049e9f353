"""Residual block of the VQ-VAE's encoders and decoders and of the priors' conditioning stack.

B images or grids, C channels, H x W positions.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.recompute import RecomputableBlock


class ResidualBlock(RecomputableBlock):
    """Residual block: x + conv1x1(relu(conv3x3(relu(x)))). Source: van den Oord et al. 2017, section 4.1."""

    def __init__(self, channels: int, residual_channels: int) -> None:
        super().__init__()
        self.conv3x3 = nn.Conv2d(channels, residual_channels, 3, padding=1)
        self.conv1x1 = nn.Conv2d(residual_channels, channels, 1)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return x + self.conv1x1(F.relu(self.conv3x3(F.relu(x))))
