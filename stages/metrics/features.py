"""Feature networks: map images to feature vectors, by which sets of images are compared.

The default, EfficientNet-Lite0 trained on ImageNet, comes as two Python packages (network and weights), so nothing is
downloaded. VGG-16 comes as the weights of another package, which is optional (see vgg.py). FID's Inception network has
no such package; `evaluate.networks` takes it as a TorchScript file. Such a file holds code, which PyTorch's interpreter
runs: use files from a source that you trust.

Axes: B images, H rows, W columns, 3 colours, D features.
"""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.efficientnet import fold_batch_norms
from stages.config import INSTALLED
from stages.errors import UserError
from stages.metrics.networks import Network, weights_file
from stages.metrics.vgg import MAX_INPUT_SIZE, MIN_INPUT_SIZE, VGG16

INPUT_SIZE = 224  # pixels per side of EfficientNet-Lite0's input
CPU_BATCH_SIZE = 8  # images; on a CPU the activations of larger batches do not fit into its cache
# Argument of published networks, such as inception-2015-12-05.pt: without it they return class probabilities.
FEATURES_ARGUMENT = "return_features"
PROBABILITY_TOLERANCE = 1e-3  # of a sum of class probabilities in half precision


class FeatureNetwork:
    """Network that maps images to features.

    A TorchScript file gets float images (B, 3, H, W) in [0, 255] and returns (B, D). If its forward has an argument
    `return_features`, that is True; other arguments keep their defaults. Raises UserError if the file does not exist,
    is not TorchScript, or requires other arguments.
    """

    def __init__(self, network: Network, device: torch.device | str = "cpu"):
        self.network, self.name = network, network.name
        self._where = f"evaluate.networks.{network.name}: {network.weights}"
        self._device = torch.device(device)
        self._network: Callable[[Tensor], Tensor]
        if network.is_perceptual:
            vgg = VGG16(weights_file(*network[:2]), self._device)
            self._network = lambda pixels: vgg.features(_resize_for_vgg(pixels) / 127.5 - 1)
        elif network.weights == INSTALLED:
            self._network = _EfficientNetLite0(weights_file(*network[:2])).to(device)
        else:
            self._network = _load_torchscript(Path(network.weights), self._where, self._device)

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Compute float32 features (B, D) of uint8 images (B, H, W, 3).

        Raises UserError if the network fails on images of this size, or returns anything else than features.
        """
        pixels = torch.from_numpy(np.ascontiguousarray(images)).to(self._device).permute(0, 3, 1, 2).float()
        batch_size = CPU_BATCH_SIZE if self._device.type == "cpu" else len(pixels)
        features = [self._features(batch) for batch in pixels.split(batch_size)]
        return torch.cat(features).float().flatten(1).cpu().numpy()

    def _features(self, pixels: Tensor) -> Tensor:
        try:
            output = self._network(pixels)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            # A TorchScript error quotes the source; its last line has the cause.
            what = str(error).strip().splitlines()[-1]
            raise self._error(f"It fails on images of {pixels.shape[3]} x {pixels.shape[2]} pixels: {what}") from error
        if problem := _describe_problem(output, len(pixels)):
            raise self._error(problem)
        return output

    def _error(self, problem: str) -> UserError:
        return UserError(
            f"The feature network {self.name} is not usable. {problem.rstrip('.')}.",
            where=self._where,
            fix="Use a TorchScript file whose forward maps float images (B, 3, H, W) in [0, 255] to features (B, D).",
            code=2,
        )

    @torch.inference_mode()
    def probabilities(self, features: np.ndarray) -> np.ndarray | None:
        """Compute float32 class probabilities (B, K) from features (B, D); None if the network has no classes."""
        if not isinstance(self._network, _EfficientNetLite0):
            return None
        logits = self._network.network._fc(torch.from_numpy(features).to(self._device))
        return F.softmax(logits.float(), dim=1).cpu().numpy()


def check_networks(networks: Sequence[Network], image_size: int) -> None:
    """Raise UserError if a network from a file cannot compute features of images of `image_size` pixels.

    Loads each such file and calls it with two images of noise.
    """
    noise = np.random.default_rng(0).integers(0, 256, (2, image_size, image_size, 3), dtype=np.uint8)
    for network in networks:
        if network.weights != INSTALLED:
            FeatureNetwork(network)(noise)


def _describe_problem(output: Any, images: int) -> str:
    """Return why a network's output cannot be features of `images` images; "" if it can."""
    if not isinstance(output, Tensor):
        return f"It must return one tensor, got {type(output).__name__}"
    if output.ndim < 2 or len(output) != images or output[0].numel() != output.shape[1]:
        return f"It must return features of shape (B, D), got {tuple(output.shape)} for {images} images"
    if not output.isfinite().all():
        return "It returns values that are not finite"
    # Class probabilities are no features: distances between them are small and say little.
    sums = output.float().flatten(1).sum(dim=1)
    if output.shape[1] > 1 and (output >= 0).all() and ((sums - 1).abs() < PROBABILITY_TOLERANCE).all():
        return f"It returns {output.shape[1]} class probabilities (each row adds up to 1), not features"
    return ""


class _EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 up to its 1280 pooled features, with batch normalization folded into the convolutions."""

    def __init__(self, weights: Path) -> None:
        super().__init__()
        from efficientnet_lite_pytorch import EfficientNet

        network = EfficientNet.from_name("efficientnet-lite0")
        # These weights are not safetensors: they come with a package. `weights_only` executes no code from the file.
        network.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
        fold_batch_norms(network.eval())
        self.network = network.to(memory_format=torch.channels_last)

    def forward(self, pixels: Tensor) -> Tensor:
        normalized = (_resize_and_crop(pixels, INPUT_SIZE) - 127) / 128
        features = self.network.extract_features(normalized.contiguous(memory_format=torch.channels_last))
        return features.mean(dim=(2, 3))


def _resize_and_crop(pixels: Tensor, side: int) -> Tensor:
    """Resize the shorter side to `side` pixels (bicubic, antialiased), crop the centre: (B, 3, H, W) in [0, 255]."""
    height, width = pixels.shape[2:]
    shorter = min(height, width)
    size = [round(height * side / shorter), round(width * side / shorter)]
    if size != [height, width]:
        pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True, align_corners=False)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    return pixels[:, :, top : top + side, left : left + side].clamp(0, 255)


def _resize_for_vgg(pixels: Tensor) -> Tensor:
    """Resize as little as VGG-16 needs: its cost grows with the pixels, and 224 per side take a CPU a second."""
    return _resize_and_crop(pixels, min(max(min(pixels.shape[2:]), MIN_INPUT_SIZE), MAX_INPUT_SIZE))


def _load_torchscript(path: Path, where: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    fix = "Set it to a TorchScript file (torch.jit.save), or remove it."
    if not path.is_file():
        raise UserError("The file of the feature network does not exist.", where=where, fix=fix, code=2)
    try:
        with warnings.catch_warnings():
            # PyTorch deprecates TorchScript, but the published weights of FID's network are TorchScript.
            warnings.simplefilter("ignore")
            network = torch.jit.load(str(path), map_location=device).eval()
            arguments = network.forward.schema.arguments[2:]  # after the module itself and the images
    except (RuntimeError, AttributeError) as error:
        raise UserError(
            "The file of the feature network is not a valid TorchScript file with a method forward.",
            where=where,
            fix=fix,
            code=2,
        ) from error
    chosen = {FEATURES_ARGUMENT: True} if FEATURES_ARGUMENT in [argument.name for argument in arguments] else {}
    required = [
        argument.name for argument in arguments if argument.name not in chosen and not argument.has_default_value()
    ]
    if required:
        raise UserError(
            f"The forward of the feature network must need no argument but the images, got {', '.join(required)}.",
            where=where,
            fix="Give the arguments default values: torch.jit.script a module that calls the network with them.",
            code=2,
        )
    return lambda pixels: network(pixels, **chosen)
