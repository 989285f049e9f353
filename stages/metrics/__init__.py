"""What is measured, one file per idea. What crosses workers adds up there, and is divided once, here.

A measure that compares two sets of images by their features has a line in `COMPARISONS`. `evaluate` then applies it
to the samples, the reconstructions and both controls, writes the numbers and shows them in the report.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from stages.config import EvaluateConfig
from stages.metrics import distance, precision_recall


class Comparison(NamedTuple):
    """A measure between sets of images: what it is called, which way is better, how many images it needs."""

    label: str
    better: str  # "lower" or "higher"
    fewest: Callable[[EvaluateConfig], int]  # images of each set
    measure: Callable[[np.ndarray, np.ndarray, EvaluateConfig, int], float | tuple[float, float]]
    """From the reference's features and the images' features, `(N, D)` each, the settings and the seed: the value, or
    the value and its standard error."""


COMPARISONS: dict[str, Comparison] = {
    "kid": Comparison(
        "KID",
        "lower",
        lambda config: 2,
        lambda reference, images, config, seed: distance.kid(reference, images, seed=seed),
    ),
    "fd": Comparison(
        "Fréchet distance",
        "lower",
        lambda config: 2,
        lambda reference, images, config, seed: distance.frechet(reference, images),
    ),
    "precision": Comparison(
        "Precision",
        "higher",
        lambda config: config.precision_recall_k + 1,
        lambda reference, images, config, seed: precision_recall.precision(
            reference, images, config.precision_recall_k
        ),
    ),
    "recall": Comparison(
        "Recall",
        "higher",
        lambda config: config.precision_recall_k + 1,
        lambda reference, images, config, seed: precision_recall.recall(reference, images, config.precision_recall_k),
    ),
}
