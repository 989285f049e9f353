"""Metrics that compare two sets of images by their features.

To add one, write its function in a file of this package and add a line to `COMPARISONS`. `evaluate` applies each one to
the samples, the reconstructions and both baselines, and shows the values in the report. metrics/evaluate.json has those
of the samples.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from stages.config import EvaluateConfig
from stages.metrics import distance, precision_recall


class Comparison(NamedTuple):
    """Metric between the features of two sets of images."""

    label: str  # name in the report
    better: str  # "lower" or "higher"
    min_images: Callable[[EvaluateConfig], int]  # required images of each set
    compute: Callable[[np.ndarray, np.ndarray, EvaluateConfig, int], float | tuple[float, float]]
    """Maps the features of the reference and of the images, (N, D) each, the settings and the seed to the value, or to
    the value and its standard error."""


COMPARISONS: dict[str, Comparison] = {
    "kid": Comparison(
        "KID",
        "lower",
        lambda config: 2,
        lambda reference, images, config, seed: distance.kid(reference, images, seed=seed),
    ),
    "frechet": Comparison(
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
