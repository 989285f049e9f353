"""Precision and recall of sets with known results."""

import numpy as np
import pytest

from stages.metrics.precision_recall import precision, recall


def _cloud(count: int, centre: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(centre, 1, (count, 4))


def test_equal_sets_have_precision_and_recall_1():
    """A set compared with itself has precision 1 and recall 1."""
    cloud = _cloud(30, 0, 0)
    assert precision(cloud, cloud, 3) == recall(cloud, cloud, 3) == 1


def test_distant_sets_have_precision_and_recall_0():
    """Sets whose supports do not overlap have precision 0 and recall 0."""
    near, far = _cloud(30, 0, 0), _cloud(30, 100, 1)
    assert precision(near, far, 3) == recall(near, far, 3) == 0


def test_samples_of_one_of_two_clusters_have_half_the_recall():
    """Samples of one of two clusters have a high precision and a recall of about one half."""
    left, right, samples = _cloud(200, 0, 0), _cloud(200, 100, 1), _cloud(200, 0, 2)
    reference = np.concatenate([left, right])
    assert precision(reference, samples, 3) > 0.6
    assert 0.3 < recall(reference, samples, 3) <= 0.5


def test_radius_excludes_the_point_itself():
    """For the points 0, 1, 3 and k = 1 the radii are 1, 1, 2: 4.9 is inside the last ball, and 5.1 is outside all."""
    line = np.array([[0.0], [1.0], [3.0]])
    assert precision(line, np.array([[4.9], [5.1]]), 1) == 0.5


def test_too_few_images_are_refused():
    """The k-th neighbour needs more images than k."""
    with pytest.raises(ValueError, match="k must be below the number of images of each set, 3, got 3; use more"):
        precision(_cloud(3, 0, 0), _cloud(9, 0, 1), 3)
