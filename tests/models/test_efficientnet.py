"""The pretrained trunk of the classifier, with random weights in place of the published ones."""

import pytest
import torch
import torch.nn.functional as F
from efficientnet_lite_pytorch import EfficientNet
from torch import nn

from models.classifier import Classifier
from models.config import ClassifierConfig
from models.efficientnet import EfficientNetLite2, fold_batch_norms

SIDE = 64  # pixels of the network's input here: its own 260 take a tenth of a second per image
IMAGES = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(autouse=True)
def _small_input(monkeypatch):
    monkeypatch.setattr(EfficientNetLite2, "input_size", SIDE)


def published_network() -> nn.Module:
    """Return the network of the package as it is published, with statistics of batch normalization."""
    torch.manual_seed(0)
    network = EfficientNet.from_name("efficientnet-lite2").eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return network


def test_features_are_those_of_the_published_network():
    """Resized, clipped and normalized as in training; batch normalization is folded into the convolutions."""
    network, published = EfficientNetLite2(), published_network()
    network.load_published(published.state_dict())
    pixels = F.interpolate((IMAGES + 1) * 127.5, size=(SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 255)
    with torch.inference_mode():
        expected = published.extract_features((pixels - 127) / 128)
        features = network(IMAGES)
    assert features.shape == (2, EfficientNetLite2.features, 2, 2) and features.std() > 0.01
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-4)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())


def test_only_the_linear_layer_is_trained():
    """The trunk has no gradients, no randomness and no statistics: a step trains 1,280 weights and a bias per class."""
    network = Classifier(ClassifierConfig(name="efficientnet_lite2"), classes=5).train()
    logits = network(IMAGES)
    logits.square().sum().backward()
    trained = {name for name, weight in network.named_parameters() if weight.grad is not None}
    assert trained == {"logits.weight", "logits.bias"} and network.logits.weight.shape == (5, 1280)
    assert torch.equal(logits, network.eval()(IMAGES))


def test_an_image_is_classified_alone_as_in_a_batch():
    """No statistics of the batch enter: any split of a batch over workers gives the same result."""
    network = Classifier(ClassifierConfig(name="efficientnet_lite2"), classes=5).train()
    alone = torch.cat([network(image[None]) for image in IMAGES])
    torch.testing.assert_close(network(IMAGES), alone)


def test_networks_that_cannot_be_folded_are_refused():
    """Statistics change in training mode, and only a convolution takes them in."""
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match="must be in evaluation mode, got training mode"):
        fold_batch_norms(network)
    with pytest.raises(ValueError, match="0 before 1 must be a Conv2d, got Linear"):
        fold_batch_norms(network.eval())
