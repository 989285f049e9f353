"""Precision and recall on sets whose answers are known."""

import numpy as np
import pytest

from stages.metrics.precision_recall import precision, recall


def _cloud(count: int, centre: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(centre, 1, (count, 4))


def test_equal_sets_cover_each_other():
    """Both are 1."""
    cloud = _cloud(30, 0, 0)
    assert precision(cloud, cloud, 3) == recall(cloud, cloud, 3) == 1


def test_sets_far_apart_share_nothing():
    """Both are 0."""
    near, far = _cloud(30, 0, 0), _cloud(30, 100, 1)
    assert precision(near, far, 3) == recall(near, far, 3) == 0


def test_one_mode_of_two_is_precise_but_recalls_half():
    """Samples of one of two clusters look real and cover half of what is real."""
    left, right, samples = _cloud(200, 0, 0), _cloud(200, 100, 1), _cloud(200, 0, 2)
    reference = np.concatenate([left, right])
    assert precision(reference, samples, 3) > 0.6
    assert 0.3 < recall(reference, samples, 3) <= 0.5


def test_radii_leave_out_the_point_itself():
    """On a line 0, 1, 3 with k = 1 the radii are 1, 1, 2, so 4.9 lies inside the last ball and 5.1 in none."""
    line = np.array([[0.0], [1.0], [3.0]])
    assert precision(line, np.array([[4.9], [5.1]]), 1) == 0.5


def test_too_few_images_are_refused():
    """k neighbours need more images than k."""
    with pytest.raises(ValueError, match="k = 3 of 3 images; use more"):
        precision(_cloud(3, 0, 0), _cloud(9, 0, 1), 3)
