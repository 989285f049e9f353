"""Classifier-based rejection: which samples are accepted, and how metrics change with the fraction that is accepted.

The score of a sample is the probability that the critic gives to the class that the sample was drawn for. The best
fraction is accepted class by class, so rejection does not change the frequencies of the classes.
Source: Razavi et al. 2019, classifier-based rejection sampling. The paper does not say whether it ranks by class.

N samples, K classes, D features.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

ROUNDING_TOLERANCE = 1e-9  # 0.1 * 30 is above 3 in floating point, and must not be rounded up to 4


def num_accepted(count: int, rate: float) -> int:
    """Return how many of the `count` samples of a class are accepted at a rate: one or more, if there are samples."""
    return min(count, max(1, math.ceil(rate * count - ROUNDING_TOLERANCE)))


def accept(scores: np.ndarray, labels: np.ndarray, rate: float, threshold: float = 0.0) -> np.ndarray:
    """Return the indices of the accepted samples, the best of each class, in ascending order.

    `scores` and `labels` are (N,). Of samples with equal scores the first ones are accepted, so a lower rate accepts a
    subset of a higher one. Samples that score below `threshold` are not accepted.
    """
    accepted = []
    for label in np.unique(labels):
        numbers = np.flatnonzero(labels == label)
        best_first = numbers[np.argsort(-scores[numbers], kind="stable")]
        accepted.append(best_first[: num_accepted(len(numbers), rate)])
    numbers = np.sort(np.concatenate(accepted)) if accepted else np.empty(0, np.int64)
    return numbers[scores[numbers] >= threshold]


class CurvePoint(NamedTuple):
    """Samples that are accepted at one rate, and the subset that is compared with the reference."""

    rate: float
    accepted: np.ndarray  # indices of all accepted samples
    compared: np.ndarray  # indices of a subset of them, which has the same number of samples of each class at all rates


def plan_curve(
    scores: np.ndarray, labels: np.ndarray, rates: Sequence[float], max_images: int, seed: int
) -> list[CurvePoint]:
    """Choose the samples to compare at each rate, the highest rate first.

    Most metrics depend on the number of images, so all rates compare the same number of samples of each class: as many
    as the lowest rate accepts, scaled down if these are more than `max_images` in all. One shuffle serves all rates, so
    neighbouring points differ only by which samples are rejected.
    """
    if not len(rates):
        return []
    classes, counts = np.unique(labels, return_counts=True)
    lowest = np.array([num_accepted(int(count), min(rates)) for count in counts])
    compared_counts = np.floor(lowest * min(1.0, max_images / lowest.sum())).astype(int)
    # Classes without a sample get one each, as many of these classes as max_images leaves room for.
    empty = np.flatnonzero(compared_counts == 0)
    compared_counts[empty[: max_images - compared_counts.sum()]] = 1
    random_ranks = np.random.default_rng(seed).permutation(len(labels))
    points = []
    for rate in sorted(set(rates), reverse=True):
        accepted = accept(scores, labels, rate)
        shuffled = accepted[np.argsort(random_ranks[accepted])]
        by_class = [
            shuffled[labels[shuffled] == label][:count] for label, count in zip(classes, compared_counts, strict=True)
        ]
        points.append(CurvePoint(rate, accepted, np.sort(np.concatenate(by_class))))
    return points


def curve_rows(
    points: Sequence[CurvePoint], scores: np.ndarray, metrics: Mapping[float, Mapping[str, Any]]
) -> tuple[list[str], list[list[Any]]]:
    """Return the header and one row per point. `metrics` maps a rate to the metrics of its compared samples."""
    names = list(dict.fromkeys(name for values in metrics.values() for name in values))
    header = ["acceptance", "accepted", "mean_score", *names]
    return header, [
        [
            point.rate,
            len(point.accepted),
            float(scores[point.accepted].mean()),
            *(metrics[point.rate].get(name, "") for name in names),
        ]
        for point in points
    ]
