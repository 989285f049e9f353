"""Image classifier: a network whose class probabilities score samples, and whose accuracy scores image sets.

It is a residual network by default. With a pretrained trunk (efficientnet.py) only the linear layer is trained.

B images, C channels, H x W pixels or positions, K classes.
Source of the block: He et al. 2016, "Identity Mappings in Deep Residual Networks", figure 4(e), with group
normalization (Wu and He 2018) in place of batch normalization. Group normalization sees one image at a time. So a batch
gives the same result however it is split over workers, and the network has no running statistics to synchronize.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.config import ClassifierConfig
from models.efficientnet import EfficientNetLite2
from models.recompute import RecomputableBlock

MAX_GROUPS = 32  # of group normalization, as in its source


class Classifier(nn.Module):
    """Features, their average over positions, and one linear layer."""

    def __init__(self, config: ClassifierConfig, classes: int) -> None:
        super().__init__()
        self.config, self.classes = config, classes
        self.features: nn.Module
        if config.name == "efficientnet_lite2":
            self.features, width = EfficientNetLite2(), EfficientNetLite2.features
        else:
            self.features, width = _residual_features(config)
        self.dropout = nn.Dropout(config.dropout)
        self.logits = nn.Linear(width, classes)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B K"]:
        """Compute the logits of each class. Pixels are in [-1, 1]."""
        return self.logits(self.dropout(self.features(images).mean(dim=(2, 3))))

    @torch.inference_mode()
    def probabilities(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B K"]:
        """Compute p(class | image) in float32."""
        return F.softmax(self(images).float(), dim=1)


class NormalizedBlock(RecomputableBlock):
    """Pre-activation residual block: two 3x3 convolutions, each after normalization and ReLU."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = _normalization(channels_in), _normalization(channels_out)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride > 1 or channels_in != channels_out:
            # An average before the 1x1 convolution, as in ResNet-D, uses every position; a strided one would use one in
            # four. With 4 channels, PyTorch 2.13 also corrupts memory in the backward pass of a strided one.
            pool = nn.AvgPool2d(stride, ceil_mode=True)
            self.shortcut = nn.Sequential(pool, nn.Conv2d(channels_in, channels_out, 1, bias=False))
        nn.init.zeros_(self.conv2.weight)  # each block starts as its shortcut, so a deep network trains from step one

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C2 H2 W2"]:
        activated = F.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        return shortcut + self.conv2(F.relu(self.norm2(self.conv1(activated))))


def _residual_features(config: ClassifierConfig) -> tuple[nn.Module, int]:
    """Build a stem and stages of residual blocks at falling resolution; return them and their number of channels."""
    kernel_size = 2 * config.stem_stride + 1  # 3 for small images, 5 at stride 2: neighbouring windows overlap
    width = config.channels
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, kernel_size, config.stem_stride, padding=config.stem_stride, bias=False)
    ]
    for stage in range(config.halvings + 1):
        for block in range(config.blocks):
            is_halving = stage > 0 and block == 0
            layers.append(NormalizedBlock(width, 2 * width if is_halving else width, stride=1 + is_halving))
            width *= 1 + is_halving
    return nn.Sequential(*layers, _normalization(width), nn.ReLU()), width


def _normalization(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(channels, MAX_GROUPS), channels)
