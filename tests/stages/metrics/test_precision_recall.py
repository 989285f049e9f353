"""Precision, recall, density and coverage: brute force, and sets with known results."""

import numpy as np
import pytest

from stages.metrics import pairs, precision_recall


def _cloud(count: int, centre: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(centre, 1, (count, 4))


def _measures(reference: np.ndarray, images: np.ndarray, k: int) -> tuple[float, float, float, float]:
    """Return precision, recall, density and coverage."""
    sums = pairs.compare(reference, images, k=k, seed=0).between
    return (
        precision_recall.precision(sums),
        precision_recall.recall(sums),
        precision_recall.density(sums, k),
        precision_recall.coverage(sums),
    )


def _brute_force(reference: np.ndarray, images: np.ndarray, k: int) -> tuple[float, float, float, float]:
    """Compute the same image by image, in the words of the papers' definitions."""

    def radius(image: np.ndarray, own_set: np.ndarray) -> float:
        others = sorted(float(np.linalg.norm(image - other)) for other in own_set)
        return others[k]  # others[0] is the image itself

    reference_balls = [(centre, radius(centre, reference)) for centre in reference]
    image_balls = [(centre, radius(centre, images)) for centre in images]

    def holds(ball: tuple[np.ndarray, float], point: np.ndarray) -> bool:
        return float(np.linalg.norm(ball[0] - point)) <= ball[1]

    return (
        float(np.mean([any(holds(ball, image) for ball in reference_balls) for image in images])),
        float(np.mean([any(holds(ball, image) for ball in image_balls) for image in reference])),
        sum(holds(ball, image) for ball in reference_balls for image in images) / (k * len(images)),
        float(np.mean([any(holds(ball, image) for image in images) for ball in reference_balls])),
    )


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(("sizes", "shift"), [((17, 17), 0.0), ((23, 17), 0.8), ((17, 23), 1.5)])
def test_measures_equal_brute_force(k: int, sizes: tuple[int, int], shift: float):
    """All four equal their definitions, also for sets of different sizes."""
    reference, images = _cloud(sizes[0], 0, 0), _cloud(sizes[1], shift, 1)
    assert _measures(reference, images, k) == pytest.approx(_brute_force(reference, images, k), abs=1e-12)


def test_equal_sets_have_precision_recall_and_coverage_1():
    """In a set compared with itself each image lies in its own ball and in k balls of others, on average."""
    cloud = _cloud(30, 0, 0)
    assert _measures(cloud, cloud, 3) == pytest.approx((1, 1, 4 / 3, 1))


def test_distant_sets_have_measures_of_0():
    """Sets whose balls do not overlap have none of the four."""
    assert _measures(_cloud(30, 0, 0), _cloud(30, 100, 1), 3) == (0, 0, 0, 0)


def test_samples_of_one_of_two_clusters_have_half_the_recall_and_the_coverage():
    """Samples of one of two clusters have a high precision, and a recall and a coverage of about one half at most."""
    left, right, samples = _cloud(200, 0, 0), _cloud(200, 100, 1), _cloud(200, 0, 2)
    precision, recall, density, coverage = _measures(np.concatenate([left, right]), samples, 3)
    assert precision > 0.6 and 0.5 < density < 1.5
    assert 0.3 < recall <= 0.5 and 0.3 < coverage <= 0.5


def test_one_outlier_of_the_reference_raises_precision_and_not_density():
    """Naeem et al. 2020, section 3.1: the ball of one real outlier is large and holds samples that are not real."""
    real, outlier, unreal = _cloud(100, 0, 0), np.full((1, 4), 20), _cloud(100, 10, 1)
    assert _measures(real, unreal, 3)[0] == 0
    precision, _, density, coverage = _measures(np.concatenate([real, outlier]), unreal, 3)
    assert precision == 1 and density == pytest.approx(1 / 3) and coverage < 0.01


def test_radius_excludes_the_point_itself():
    """For the points 0, 1, 3 and k = 1 the radii are 1, 1, 2: 4.9 is inside the last ball, and 5.1 is outside all."""
    line = np.array([[0.0], [1.0], [3.0]])
    assert _measures(line, np.array([[4.9], [5.1]]), 1)[0] == 0.5
