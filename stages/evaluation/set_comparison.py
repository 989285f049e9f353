"""Comparison of image sets by their features, on the workers: sums over tiles of pairs of images.

First come sums within each set, and metrics of the features themselves. Sums between two sets follow, because they need
the radii of both.

Axes: N images, S subset selections.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stages.config import EvaluateConfig
from stages.evaluation.part_files import FeatureFile, feature_name, load_or_compute, part_path
from stages.mapping.parts import Part, Result, map_parts
from stages.metrics import comparisons, pairs
from stages.metrics.comparisons import Value
from stages.metrics.pairs import PairSums, SetComparison, SetSums
from stages.metrics.threads import one_thread
from stages.runtime.context import StageContext

MAX_LOCAL_PAIRS = (
    2**27
)  # pairs of images that this process compares itself: in seconds, as long as workers need to start
UNIT = "compared image"  # of the progress


class Pair(NamedTuple):
    """Two image sets to compare."""

    reference: str
    images: str


class SetWorker:
    """Measures one part after another: rows of a set with the set itself or with another, or all of two sets.

    `squared_radii` has the radii of each set, by the name of its file; none before those are known.
    """

    def __init__(
        self,
        features_folder: Path,
        results_folder: Path,
        settings: Mapping[str, Any],
        squared_radii: Mapping[str, np.ndarray],
        threads: int,
    ):
        self.features_folder, self.results_folder, self.threads = features_folder, results_folder, threads
        self.k, self.seed, self.size = (settings[name] for name in ("k", "seed", "size"))
        self.squared_radii = squared_radii
        self.prepared = cache(self._prepare)

    @cached_property
    def selected(self) -> tuple[np.ndarray, np.ndarray]:
        return pairs.selections(self.seed, self.size, self.size)

    def __call__(self, part: Part) -> Result:
        return load_or_compute(part_path(self.results_folder, part), lambda: self._measure(part))

    def _measure(self, part: Part) -> dict[str, Any]:
        with one_thread():  # the same numbers on any number of processors
            names = [feature_name(part["network"], part[role]) for role in Pair._fields if part[role]]
            if part["measure"] not in ("set", "pair"):  # the name of a metric of the features themselves
                metric = comparisons.COMPARISONS[part["measure"]]
                assert metric.of_features
                return {"value": metric.of_features(*(self.prepared(part["measure"], name) for name in names))}
            files = [FeatureFile(self.features_folder / name, self.size) for name in names]
            rows = slice(part["start"], part["stop"])
            if part["measure"] == "set":
                return pairs.measure_set(files[0], rows, self.selected, self.k, self.threads)._asdict()
            radii = [self.squared_radii[name] for name in names]
            return pairs.measure_pair(files[0], files[1], rows, radii, self.selected, self.threads)._asdict()

    def _prepare(self, metric: str, name: str) -> Any:
        return comparisons.COMPARISONS[metric].prepare(FeatureFile(self.features_folder / name, self.size))


def compare_sets(
    features_folder: Path,
    results_folder: Path,
    networks: Sequence[str],
    pairs_by_name: Mapping[str, Pair],
    size: int,
    config: EvaluateConfig,
    seed: int,
    context: StageContext,
) -> dict[str, dict[str, dict[str, Value]]]:
    """Compute all possible metrics of pairs of image sets: network -> name of the pair -> metric.

    Each set has its first `size` images. The workers compute, or this process if there are few images.
    """
    sets = list(dict.fromkeys(image_set for pair in pairs_by_name.values() for image_set in pair))
    metrics = comparisons.possible(size, config)
    settings = {"k": config.precision_recall_k, "seed": seed, "size": size}

    def map_all(parts: list[Part], squared_radii: Mapping[str, np.ndarray]) -> list[Result]:
        arguments = (features_folder, results_folder, settings, squared_radii)
        if sum(part["weight"] for part in parts) * size <= MAX_LOCAL_PAIRS:
            return _map_here(SetWorker(*arguments, threads=1), parts, context)
        threads = max(1, int(context.cluster.cpus_per_worker))
        return map_parts(SetWorker, (*arguments, threads), parts, context=context, unit=UNIT)

    first = [
        *_rows("set", networks, [Pair(image_set, "") for image_set in sets], size),
        *_feature_metrics(
            [name for name, metric in metrics.items() if metric.of_features], networks, pairs_by_name, size
        ),
    ]
    results = _by_key(first, map_all(first, {}))
    within = {
        (network, image_set): pairs.join_sets([SetSums(**result) for result in results["set", network, image_set, ""]])
        for network in networks
        for image_set in sets
    }
    squared_radii = {feature_name(*key): sums.squared_radii for key, sums in within.items()}
    second = list(_rows("pair", networks, list(pairs_by_name.values()), size))
    results |= _by_key(second, map_all(second, squared_radii))
    compared: dict[str, dict[str, dict[str, Value]]] = {network: {} for network in networks}
    for network in networks:
        for name, pair in pairs_by_name.items():
            sums = SetComparison(
                within[network, pair.reference].kernels[0],
                within[network, pair.images].kernels[1],
                pairs.join_pairs([PairSums(**result) for result in results["pair", network, *pair]]),
            )
            of_features = {
                metric: _value(results[metric, network, *pair][0]["value"])
                for metric in metrics
                if metrics[metric].of_features
            }
            compared[network][name] = comparisons.combine(metrics, sums, of_features, config)
    return compared


def _value(value: Any) -> Value:
    return tuple(value) if isinstance(value, list) else value


def _map_here(worker: SetWorker, parts: Sequence[Part], context: StageContext) -> list[Result]:
    results, total = [], sum(part["weight"] for part in parts)
    with one_thread(), ThreadPoolExecutor(os.cpu_count()) as executor:
        for result in executor.map(worker, parts):
            results.append(result)
            done = sum(part["weight"] for part in parts[: len(results)])
            context.reporter.progress(done, total, UNIT, {})
    return results


def _rows(measure: str, networks: Sequence[str], sets: Sequence[Pair], size: int) -> Iterator[Part]:
    for network in networks:
        for pair in dict.fromkeys(sets):
            for rows in pairs.row_ranges(size):
                yield {
                    "measure": measure,
                    "network": network,
                    **pair._asdict(),
                    "start": rows.start,
                    "stop": rows.stop,
                    "weight": rows.stop - rows.start,
                }


def _feature_metrics(
    metrics: Sequence[str], networks: Sequence[str], pairs_by_name: Mapping[str, Pair], size: int
) -> Iterator[Part]:
    for network in networks:
        for pair in dict.fromkeys(pairs_by_name.values()):
            for metric in metrics:
                yield {"measure": metric, "network": network, **pair._asdict(), "weight": size}


def _by_key(parts: Sequence[Part], results: Sequence[Result]) -> dict[tuple[str, ...], list[Result]]:
    """Group results by measure, network and image sets, in the order of the parts."""
    grouped: dict[tuple[str, ...], list[Result]] = {}
    for part, result in zip(parts, results, strict=True):
        key = part["measure"], part["network"], part["reference"], part["images"]
        grouped.setdefault(key, []).append(result)
    return grouped
