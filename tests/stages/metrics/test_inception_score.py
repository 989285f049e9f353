"""Inception score."""

import numpy as np
import pytest

from stages.metrics.features import FeatureNetwork
from stages.metrics.inception_score import inception_score
from stages.metrics.networks import read_networks


def test_certain_and_varied_images_score_the_number_of_classes():
    """Each of K classes with certainty, equally often: K, the maximum."""
    assert inception_score(np.eye(7)) == pytest.approx(7)


def test_equal_answers_score_one():
    """The same answer for each image, certain or not, says nothing: 1, the minimum."""
    assert inception_score(np.tile([0.2, 0.5, 0.3], (9, 1))) == pytest.approx(1)
    assert inception_score(np.tile([0.0, 1.0, 0.0], (9, 1))) == pytest.approx(1)


def test_score_is_the_exponential_of_the_mutual_information():
    """exp(H(mean) - mean H), by the definition."""
    p = np.random.default_rng(0).dirichlet(np.ones(5), 40)
    mean = p.mean(axis=0)
    information = -(mean * np.log(mean)).sum() + (p * np.log(p)).sum(axis=1).mean()
    assert inception_score(p) == pytest.approx(np.exp(information))


def test_probabilities_are_those_of_the_packaged_network():
    """The features of the network lead to its class probabilities."""
    network = FeatureNetwork(read_networks({"efficientnet_lite0": "installed"})[0])
    images = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    probabilities = network.probabilities(network(images))
    assert probabilities is not None and probabilities.shape == (2, 1000)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
