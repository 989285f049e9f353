"""Metrics that compare two sets of images by their features.

To add one, write its function in a file of this package and add a line to `SET_METRICS`. `evaluate` applies each one to
the samples, the reconstructions and both baselines, and shows the values in the report. metrics/evaluate.json has only
those of the samples that `HEADLINE_SET_METRICS` (stages/evaluation/summary.py) names.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from stages.config import EvaluateConfig
from stages.metrics import distance, pairs, precision_recall
from stages.metrics.pairs import Features, SetComparison

Value = float | tuple[float, float]  # or a value and its standard error


class SetMetric(NamedTuple):
    """Metric between the features of two sets of images. It has one of `of_pairs` and `of_features`."""

    label: str  # name in the report
    better: str  # "lower" or "higher"
    min_images: Callable[[EvaluateConfig], int]  # required images of each set
    of_pairs: Callable[[SetComparison, EvaluateConfig], Value] | None = None
    """Maps the sums over pairs of images, which several workers compute."""
    of_features: Callable[[Any, Any], Value] | None = None
    """Maps the prepared features of the reference and of the images; one worker computes it."""
    prepare: Callable[[Features], Any] = lambda features: features
    """Maps the features of one set, (N, D), before `of_features`; a worker does so once for each set."""

    def of_sets(self, reference: Features, images: Features) -> Value:
        """Compute a metric that has `of_features`."""
        assert self.of_features
        return self.of_features(self.prepare(reference), self.prepare(images))


SET_METRICS: dict[str, SetMetric] = {
    "kid": SetMetric("KID", "lower", lambda config: 2, of_pairs=lambda sums, config: distance.kid(sums)),
    "frechet": SetMetric(
        "Fréchet distance",
        "lower",
        lambda config: 2,
        of_features=distance.frechet_of_gaussians,
        prepare=distance.fit_gaussian,
    ),
    "precision": SetMetric(
        "Precision",
        "higher",
        lambda config: config.precision_recall_k + 1,
        of_pairs=lambda sums, config: precision_recall.precision(sums.between),
    ),
    "recall": SetMetric(
        "Recall",
        "higher",
        lambda config: config.precision_recall_k + 1,
        of_pairs=lambda sums, config: precision_recall.recall(sums.between),
    ),
    "density": SetMetric(
        "Density",
        "higher",
        lambda config: config.precision_recall_k + 1,
        of_pairs=lambda sums, config: precision_recall.density(sums.between, config.precision_recall_k),
    ),
    "coverage": SetMetric(
        "Coverage",
        "higher",
        lambda config: config.precision_recall_k + 1,
        of_pairs=lambda sums, config: precision_recall.coverage(sums.between),
    ),
}


def possible(num_images: int, config: EvaluateConfig) -> dict[str, SetMetric]:
    """Return the metrics that sets of `num_images` images can have."""
    return {name: metric for name, metric in SET_METRICS.items() if num_images >= metric.min_images(config)}


def compare(reference: Features, images: Features, config: EvaluateConfig, seed: int) -> dict[str, Value]:
    """Compute all possible metrics of two sets in this process, from their features (N, D) and (M, D)."""
    metrics = possible(min(len(reference), len(images)), config)
    of_features = {name: metric.of_sets(reference, images) for name, metric in metrics.items() if metric.of_features}
    sums = pairs.compare(reference, images, k=config.precision_recall_k, seed=seed)
    return combine(metrics, sums, of_features, config)


def combine(
    metrics: Mapping[str, SetMetric],
    sums: SetComparison,
    of_features: Mapping[str, Value],
    config: EvaluateConfig,
) -> dict[str, Value]:
    """Return the values of metrics in their order: those of the sums, and those already computed of the features."""
    return {
        name: metric.of_pairs(sums, config) if metric.of_pairs else of_features[name]
        for name, metric in metrics.items()
    }
