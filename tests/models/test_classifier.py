"""The image classifier."""

import pytest
import torch

from models.classifier import Classifier
from models.config import ClassifierConfig
from models.cost import count_parameters

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("halvings", "stem_stride", "side"), [(0, 1, 16), (2, 1, 4), (1, 3, 3)])
def test_each_stage_halves_the_resolution_and_doubles_the_width(halvings, stem_stride, side):
    """The last stage has image size / stride positions, rounded up."""
    config = ClassifierConfig(8, halvings, 1, stem_stride)
    features = Classifier(config, classes=5).features(IMAGES)
    assert features.shape == (3, 8 * 2**halvings, side, side)
    assert -(-16 // config.stride) == side


def test_an_image_is_classified_alone_as_in_a_batch():
    """No statistics of the batch enter: any split of a batch over workers gives the same result."""
    network = Classifier(ClassifierConfig(8, 1, 2), classes=5).train()
    alone = torch.cat([network(image[None]) for image in IMAGES])
    torch.testing.assert_close(network(IMAGES), alone)


def test_a_block_starts_as_its_shortcut():
    """A deep network gives the same as a shallow one before training: gradients reach every block at once."""
    torch.manual_seed(0)
    block = Classifier(ClassifierConfig(8, 0, 1), classes=5).features[1]
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(block(x), x)


def test_every_weight_has_a_gradient():
    """The loss reaches all weights after one step; before it, the weights behind a zero convolution have zeros."""
    network = Classifier(ClassifierConfig(4, 1, 1), classes=2)
    network(IMAGES.contiguous(memory_format=torch.channels_last)).square().sum().backward()
    assert all(weight.grad is not None for weight in network.parameters())


def test_probabilities_add_up_to_one():
    """Probabilities of the classes are float32, also of a bfloat16 network."""
    network = Classifier(ClassifierConfig(8, 1, 1), classes=5).eval().bfloat16()
    probabilities = network.probabilities(IMAGES.bfloat16())
    assert probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities.sum(1), torch.ones(3))


def test_layers_of_the_imagenet_network_are_those_of_resnet_18():
    """Four stages of two blocks, 64 to 512 channels: 11.2 million weights before the logits."""
    with torch.device("meta"):
        network = Classifier(ClassifierConfig(64, 3, 2, stem_stride=4), classes=1000)
    assert round(count_parameters(network.features) / 1e6, 1) == 11.2
