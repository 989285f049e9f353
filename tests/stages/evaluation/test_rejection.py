"""Classifier-based rejection: which samples are accepted, and which are compared."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.evaluation.rejection import accept, num_accepted, plan_curve

RANDOM = np.random.default_rng(0)
SCORES, LABELS = RANDOM.random(200).astype(np.float32), np.sort(RANDOM.integers(0, 5, 200))
RATES = (1.0, 0.5, 0.25, 0.1)


@given(count=st.integers(1, 10_000), tenths=st.integers(1, 1000))
def test_number_accepted_is_the_fraction_rounded_up(count, tenths):
    """Exactly, although 0.1 * 30 is above 3 in floating point."""
    assert num_accepted(count, tenths / 1000) == -(-count * tenths // 1000)


def test_everything_is_accepted_at_rate_one():
    """Rate 1 changes nothing."""
    assert accept(SCORES, LABELS, 1.0).tolist() == list(range(200))


@pytest.mark.parametrize("rate", RATES)
def test_best_samples_of_each_class_are_accepted(rate):
    """No rejected sample of a class scores higher than an accepted one, and each class keeps its share."""
    accepted = accept(SCORES, LABELS, rate)
    rejected = np.setdiff1d(np.arange(200), accepted)
    for label in range(5):
        best, rest = accepted[LABELS[accepted] == label], rejected[LABELS[rejected] == label]
        assert len(best) == num_accepted(len(best) + len(rest), rate)
        assert not len(rest) or SCORES[best].min() >= SCORES[rest].max()


def test_a_lower_rate_accepts_a_subset_with_a_higher_mean_score():
    """The mean score rises strictly as more is rejected."""
    sets = [accept(SCORES, LABELS, rate) for rate in RATES]
    means = [SCORES[numbers].mean() for numbers in sets]
    assert all(set(lower) < set(higher) for higher, lower in pairwise(sets))
    assert means == sorted(means) and len(set(means)) == len(means)


def test_of_equal_scores_the_first_is_accepted():
    """The choice does not depend on how the sort breaks ties."""
    assert accept(np.ones(8), np.zeros(8, int), 0.5).tolist() == [0, 1, 2, 3]


def test_threshold_rejects_what_scores_lower():
    """With rate 1, the threshold alone decides; it may accept nothing."""
    assert (accept(SCORES, LABELS, 1.0, threshold=0.7) == np.flatnonzero(SCORES >= 0.7)).all()
    assert len(accept(SCORES, LABELS, 1.0, threshold=1.0)) == 0


def test_sets_of_a_curve_have_equally_many_samples_of_each_class():
    """Metrics depend on the number of images, so all points of a curve compare the same number."""
    points = plan_curve(SCORES, LABELS, RATES, max_images=1000, seed=0)
    counts = [np.bincount(LABELS[point.compared]).tolist() for point in points]
    assert counts == [np.bincount(LABELS[accept(SCORES, LABELS, min(RATES))]).tolist()] * len(RATES)
    assert all(set(point.compared) <= set(point.accepted) for point in points)
    assert [point.rate for point in points] == sorted(RATES, reverse=True)


def test_a_curve_compares_at_most_the_reference_images():
    """A limit below the number of accepted samples shrinks each class in proportion."""
    points = plan_curve(SCORES, LABELS, (1.0, 0.5), max_images=20, seed=0)
    assert 15 <= len(points[0].compared) <= 20 and len(points[1].compared) == len(points[0].compared)


def test_a_curve_of_more_classes_than_reference_images_leaves_classes_out():
    """No rate compares more samples than there are reference images."""
    labels = np.repeat(np.arange(100), 10)
    points = plan_curve(np.random.default_rng(0).random(1000), labels, (1.0, 0.5), max_images=75, seed=0)
    assert [len(point.compared) for point in points] == [75, 75]


def test_a_curve_depends_on_the_seed_only_by_which_accepted_samples_are_compared():
    """Equal seeds give equal sets; another seed compares other samples, and accepts the same."""
    first, again, other = (plan_curve(SCORES, LABELS, RATES, 1000, seed)[0] for seed in (0, 0, 1))
    assert (first.compared == again.compared).all() and (first.accepted == other.accepted).all()
    assert (first.compared != other.compared).any()


def test_no_rates_make_no_curve():
    """An empty curve costs nothing."""
    assert plan_curve(SCORES, LABELS, (), 1000, 0) == []
