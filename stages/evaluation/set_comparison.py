"""Comparison of image sets by their features, on the workers. The metrics are defined in stages/metrics/set_metrics.py.

The workers compute two rounds of parts. The first has the sums over pairs of images within each set, and the metrics
that need features only. The second has the sums over pairs of images of two sets, which need the radii of both sets.
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
from stages.metrics import pairs, set_metrics
from stages.metrics.pairs import PairSums, SetComparison, SetSums
from stages.metrics.set_metrics import Value
from stages.metrics.threads import one_thread
from stages.runtime.context import StageContext

# Up to this number of pairs of images, this process computes itself. That takes seconds, as starting workers does.
MAX_LOCAL_PAIRS = 2**27
UNIT = "compared image"  # of the progress


class SetPair(NamedTuple):
    """Names of two image sets to compare."""

    reference: str
    images: str


class SetWorker:
    """Mapper of parts whose `task` is "set" (sums within a set), "pair" (sums between two), or the name of a metric.

    `squared_radii` has the radii of each set, by the name of its file of features; it is empty in the first round.
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
        self.prepare = cache(self._prepare)

    @cached_property
    def selected(self) -> tuple[np.ndarray, np.ndarray]:
        return pairs.selections(self.seed, self.size, self.size)

    def __call__(self, part: Part) -> Result:
        return load_or_compute(part_path(self.results_folder, part), lambda: self._compute(part))

    def _compute(self, part: Part) -> dict[str, Any]:
        with one_thread():  # the same numbers on any number of processors
            task = part["task"]
            names = [feature_name(part["network"], part[role]) for role in SetPair._fields if part[role]]
            if task not in ("set", "pair"):
                metric = set_metrics.SET_METRICS[task]
                assert metric.of_features
                return {"value": metric.of_features(*(self.prepare(task, name) for name in names))}
            files = [FeatureFile(self.features_folder / name, self.size) for name in names]
            rows = slice(part["start"], part["stop"])
            if task == "set":
                return pairs.measure_set(files[0], rows, self.selected, self.k, self.threads)._asdict()
            radii = [self.squared_radii[name] for name in names]
            return pairs.measure_pair(files[0], files[1], rows, radii, self.selected, self.threads)._asdict()

    def _prepare(self, metric: str, name: str) -> Any:
        return set_metrics.SET_METRICS[metric].prepare(FeatureFile(self.features_folder / name, self.size))


def compare_sets(
    features_folder: Path,
    results_folder: Path,
    networks: Sequence[str],
    pairs_by_name: Mapping[str, SetPair],
    size: int,
    config: EvaluateConfig,
    seed: int,
    context: StageContext,
) -> dict[str, dict[str, dict[str, Value]]]:
    """Compute all possible metrics of pairs of image sets: network -> name of the pair -> metric.

    Each set is its first `size` images. The workers compute, or this process if there are few images.
    """
    image_sets = list(dict.fromkeys(image_set for pair in pairs_by_name.values() for image_set in pair))
    metrics = set_metrics.possible(size, config)
    feature_metrics = [name for name, metric in metrics.items() if metric.of_features]
    settings = {"k": config.precision_recall_k, "seed": seed, "size": size}

    def map_all(parts: list[Part], squared_radii: Mapping[str, np.ndarray]) -> list[Result]:
        arguments = (features_folder, results_folder, settings, squared_radii)
        if sum(part["weight"] for part in parts) * size <= MAX_LOCAL_PAIRS:
            return _map_locally(SetWorker(*arguments, threads=1), parts, context)
        threads = max(1, int(context.cluster.cpus_per_worker))
        return map_parts(SetWorker, (*arguments, threads), parts, context=context, unit=UNIT)

    first_round = [
        *_row_parts("set", networks, [SetPair(image_set, "") for image_set in image_sets], size),
        *_metric_parts(feature_metrics, networks, pairs_by_name, size),
    ]
    results = _by_key(first_round, map_all(first_round, {}))
    set_sums = {
        (network, image_set): pairs.join_sets([SetSums(**result) for result in results["set", network, image_set, ""]])
        for network in networks
        for image_set in image_sets
    }
    squared_radii = {feature_name(*key): sums.squared_radii for key, sums in set_sums.items()}
    second_round = list(_row_parts("pair", networks, list(pairs_by_name.values()), size))
    results |= _by_key(second_round, map_all(second_round, squared_radii))
    compared: dict[str, dict[str, dict[str, Value]]] = {network: {} for network in networks}
    for network in networks:
        for name, pair in pairs_by_name.items():
            sums = SetComparison(
                set_sums[network, pair.reference].kernel_sums_as_reference,
                set_sums[network, pair.images].kernel_sums_as_images,
                pairs.join_pairs([PairSums(**result) for result in results["pair", network, *pair]]),
            )
            of_features = {metric: _to_value(results[metric, network, *pair][0]["value"]) for metric in feature_metrics}
            compared[network][name] = set_metrics.combine(metrics, sums, of_features, config)
    return compared


def _to_value(value: Any) -> Value:
    """Convert a value that was JSON in a part's file."""
    return tuple(value) if isinstance(value, list) else value


def _map_locally(worker: SetWorker, parts: Sequence[Part], context: StageContext) -> list[Result]:
    results, total = [], sum(part["weight"] for part in parts)
    with one_thread(), ThreadPoolExecutor(os.cpu_count()) as executor:
        for result in executor.map(worker, parts):
            results.append(result)
            done = sum(part["weight"] for part in parts[: len(results)])
            context.reporter.progress(done, total, UNIT, {})
    return results


def _row_parts(task: str, networks: Sequence[str], set_pairs: Sequence[SetPair], size: int) -> Iterator[Part]:
    """Yield parts of some rows of a set each; without its `images`, a pair stands for the set `reference` alone."""
    for network in networks:
        for pair in dict.fromkeys(set_pairs):
            for rows in pairs.row_ranges(size):
                yield {
                    "task": task,
                    "network": network,
                    **pair._asdict(),
                    "start": rows.start,
                    "stop": rows.stop,
                    "weight": rows.stop - rows.start,
                }


def _metric_parts(
    metrics: Sequence[str], networks: Sequence[str], pairs_by_name: Mapping[str, SetPair], size: int
) -> Iterator[Part]:
    for network in networks:
        for pair in dict.fromkeys(pairs_by_name.values()):
            for metric in metrics:
                yield {"task": metric, "network": network, **pair._asdict(), "weight": size}


def _by_key(parts: Sequence[Part], results: Sequence[Result]) -> dict[tuple[str, ...], list[Result]]:
    """Group results by task, network and image sets, in the order of the parts."""
    grouped: dict[tuple[str, ...], list[Result]] = {}
    for part, result in zip(parts, results, strict=True):
        key = part["task"], part["network"], part["reference"], part["images"]
        grouped.setdefault(key, []).append(result)
    return grouped
