"""VGG-16 of ST-LPIPS: features of images, and the perceptual distance of two images. Lower is nearer.

The optional package stlpips_pytorch has the convolutions of VGG-16, trained on ImageNet with blurred pooling, and the
heads of the distance, in one file. Only that file is read: the package is never imported, as it needs torchvision.

ST-LPIPS is the shift-tolerant LPIPS: the squared difference of unit feature vectors, weighted by a head per block of
VGG-16, averaged over positions and added up over the blocks. It was trained on patches of photographs of
64 x 64 pixels; of smaller images or drawings, only relative values say something.
Sources: Simonyan and Zisserman 2015 (VGG-16), Zhang et al. 2018 (LPIPS), Zhang 2019 (blurred pooling), Ghildyal and Liu
2022 (ST-LPIPS).

B images, H rows, W columns, C channels of a block.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.errors import UserError
from stages.metrics.networks import PACKAGES

# Numbers of the convolutions in the file, by block. A block but the first begins with a pooling and a blur.
BLOCKS = ((0, 2), (6, 8), (12, 14, 16), (20, 22, 24), (28, 30, 32))
MIN_SIZE = 18  # pixels per side: the last blur mirrors two rows of its grid, which has three then
MIN_INPUT_SIZE, MAX_INPUT_SIZE = 64, 224  # pixels per side of images whose features are compared
PIXELS_AT_ONCE = 2**18  # bounds the activations of a batch: 64 channels of float32 are 64 MiB
NORM_EPSILON = 1e-10  # of the unit vectors, as in the package


class VGG16:
    """Convolutions of VGG-16 and the heads of ST-LPIPS. Images are float32 (B, 3, H, W) in [-1, 1]."""

    def __init__(self, weights: Path, device: torch.device | str = "cpu"):
        """Read the file of weights. Raises UserError if it is damaged or has other tensors."""
        self._device = torch.device(device)
        self._weights = {name: tensor.to(device) for name, tensor in _read(weights).items()}

    def blocks(self, images: Tensor) -> Iterator[Tensor]:
        """Yield the output of each block, (B, C, H, W); each grid has about half the rows of the one before."""
        weights = self._weights
        x = (images - weights["scaling_layer.shift"]) / weights["scaling_layer.scale"]
        for number, convolutions in enumerate(BLOCKS, 1):
            prefix = f"net.slice{number}."
            if number > 1:
                x = F.max_pool2d(x, 2, stride=1)
                # The file's filter is a binomial one, 1 2 1 by 1 2 1, for each channel.
                blur = weights[f"{prefix}{convolutions[0] - 1}.filt"]
                x = F.conv2d(F.pad(x, [2] * 4, mode="reflect"), blur, stride=2, groups=len(blur))
            for index in convolutions:
                weight, bias = (weights[f"{prefix}{index}.{name}"] for name in ("weight", "bias"))
                x = F.relu(F.conv2d(x, weight, bias, padding=1))
            yield x

    def features(self, images: Tensor) -> Tensor:
        """Average the last block over positions: (B, C), 512 channels."""
        *_, last = self.blocks(images)
        return last.mean(dim=(2, 3))

    @torch.inference_mode()
    def distances(self, images: Tensor, others: Tensor) -> Tensor:
        """Compute the ST-LPIPS of each pair of images, (B,), of sides of MIN_SIZE pixels or more."""
        batch_size = max(1, PIXELS_AT_ONCE // images[0, 0].numel())
        batches = (batch.to(self._device).float().split(batch_size) for batch in (images, others))
        return torch.cat([self._distances(*pair) for pair in zip(*batches, strict=True)])

    def _distances(self, images: Tensor, others: Tensor) -> Tensor:
        distances = images.new_zeros(len(images))
        for index, pair in enumerate(zip(self.blocks(images), self.blocks(others), strict=True)):
            unit, other_unit = (block / (block.norm(dim=1, keepdim=True) + NORM_EPSILON) for block in pair)
            head = self._weights[f"lin{index}.model.1.weight"]  # (1, C, 1, 1)
            distances += ((unit - other_unit).square() * head).sum(dim=1).mean(dim=(1, 2))
        return distances


def names() -> set[str]:
    """Return the names of the tensors in the file."""
    names = {"scaling_layer.shift", "scaling_layer.scale"}
    for number, convolutions in enumerate(BLOCKS, 1):
        names |= {f"net.slice{number}.{index}.{kind}" for index in convolutions for kind in ("weight", "bias")}
        names |= {f"net.slice{number}.{convolutions[0] - 1}.filt"} if number > 1 else set()
        names.add(f"lin{number - 1}.model.1.weight")
    return names


def _read(path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        raise _unusable(path, "cannot be read: it is a folder")
    try:
        # These weights are not safetensors: they come with a package. `weights_only` executes no code from the file.
        weights = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # of several kinds, by the damage
        # PyTorch's own text is not repeated: it advises to load the file with the code that it may hold.
        raise _unusable(path, "cannot be read: it is damaged, or is no file of tensors") from error
    if not isinstance(weights, dict) or set(weights) != names():
        raise _unusable(path, "has other tensors than those of VGG-16 and ST-LPIPS")
    return dict(weights)


def _unusable(path: Path, problem: str) -> UserError:
    return UserError(
        f"The file of weights of the feature network vgg16 {problem.rstrip('.')}.",
        where=path,
        fix=f"Run: {PACKAGES['vgg16'].command} --force-reinstall",
        code=2,
    )
