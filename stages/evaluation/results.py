"""Results of an evaluation: the parts' results combined into metrics and into the contents of the report.

Axes: N images, D features, K codebook entries, k nearest images.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from stages.evaluation import ladder, summary
from stages.evaluation.inputs import EvaluationInputs, EvaluationPlan
from stages.evaluation.origin import describe_origin
from stages.evaluation.part_files import FeatureFile, feature_name
from stages.evaluation.report_data import NearestImages, ReportData, SamplesOfClass
from stages.evaluation.summary import Metrics
from stages.formats import artifact, curves
from stages.mapping.parts import Part, Result
from stages.metrics import codecs, distortion, neighbours, rate, usage
from stages.metrics.codecs import CodecSums
from stages.metrics.distortion import DistortionSums
from stages.metrics.rate import LikelihoodSums
from stages.metrics.set_metrics import Value

MAX_SAMPLES = 512  # on the page, over all classes


class EvaluationResults:
    """Results of all parts of one evaluation, by task, image set and level or network."""

    def __init__(
        self,
        inputs: EvaluationInputs,
        plan: EvaluationPlan,
        parts: Sequence[Part],
        results: Sequence[Result],
        features_folder: Path,
        compared: Mapping[str, Mapping[str, Mapping[str, Value]]],
    ):
        """Create the results. `compared` has metrics of pairs of image sets: network -> name of the pair -> metric."""
        self.inputs, self.plan, self._compared = inputs, plan, compared
        self._features_folder = features_folder
        # (task, image set[, level or network]) -> results in order of images, and the ends of their ranges of images
        self._results: dict[tuple[str, ...], list[Result]] = {}
        self._stops: dict[tuple[str, ...], list[int]] = {}
        for part, result in zip(parts, results, strict=True):
            key = part["task"], part["image_set"], *(part[name] for name in ("level", "network") if name in part)
            self._results.setdefault(key, []).append(result)
            self._stops.setdefault(key, []).append(part["stop"])

    def metrics(self) -> Metrics:
        """Compute all metrics, as metrics.json of the report has them."""
        levels, shards = self.inputs.codes.levels, self.inputs.shards
        reference, num_compared = self.plan.reference, self.plan.num_compared
        likelihood = summary.likelihood(self._likelihood_sums(), levels)
        reconstruction = summary.reconstruction(self._distortion_sums())
        compared = summary.name_metrics(self._compared, self.plan.networks, num_compared)
        same_classes = ladder.have_same_classes(self.inputs.samples.labels, self.inputs.images(reference).labels)
        quality_ladder = ladder.metrics(self.features, self.plan, list(levels), self.plan.networks[0], same_classes)
        return {
            "seed": self.plan.seed,
            "reference": reference,
            "num_images": {split: len(shards.split(split)) for split in ("train", "validation")}
            | {"samples": self.inputs.samples.count, "compared": num_compared},
            "sampling": summary.sampling(self.inputs.samples.artifact.meta),
            "reconstruction": reconstruction,
            "codebook": summary.codebook(self.entry_counts),
            "likelihood": likelihood,
            "rate": self._rates(likelihood, reconstruction),
            "rate_distortion": self._rate_distortion(),
            "networks": {network.name: network.digest for network in self.plan.networks},
            "compared": {**compared, **summary.kid_ratios(compared, self.plan.networks[0])},
            **({"ladder": quality_ladder} if quality_ladder else {}),
            "neighbours": summary.memorization(self.nearest_distances, self.plan.num_searched),
        }

    def _rates(self, likelihood: Metrics, reconstruction: Metrics) -> Metrics:
        """Compute the rates of the reference images."""
        column_bytes, rows = rate.column_bytes(self.inputs.codes_folder / name for name in self.inputs.codes.files())
        return summary.rates(
            self.inputs.codes.levels,
            likelihood,
            reconstruction[self.plan.reference]["mse"],
            split=self.plan.reference,
            image_size=self.inputs.shards.image_size,
            column_bytes=column_bytes,
            rows=rows,
        )

    def _rate_distortion(self) -> list[Metrics]:
        """Compute the points of the codes and those of the codecs, of the same images: the first of the reference."""
        levels, count = self.inputs.codes.levels, self.plan.num_rated
        reconstruction = summary.reconstruction(self._distortion_sums(count))
        rates = self._rates(summary.likelihood(self._likelihood_sums(count), levels), reconstruction)
        return summary.rate_distortion(
            rates, reconstruction[self.plan.reference], list(levels)
        ) + summary.codec_rate_distortion(self._codec_sums(), self.inputs.shards.image_size)

    @cached_property
    def entry_counts(self) -> dict[str, dict[str, np.ndarray]]:
        """Occurrences of each codebook entry, (K,), over all images without augmented copies: level -> split."""
        codes = self.inputs.codes
        splits = [split for split in codes.splits if split in ("train", "validation")]
        counts: dict[str, dict[str, np.ndarray]] = {
            level: {split: np.zeros(grid.entries, np.int64) for split in splits} for level, grid in codes.levels.items()
        }
        for split in splits:
            for codes_of_file in codes.by_file(split):
                for level, grids in codes_of_file.originals().codes.items():
                    counts[level][split] += usage.count(grids, len(counts[level][split]))
        return counts

    def features(self, image_set: str) -> np.ndarray:
        """Read the first network's features of the images of an image set that the quality ladder compares, (N, D)."""
        file = FeatureFile(self._features_folder / feature_name(self.plan.networks[0].name, image_set))
        return file[: 2 * self.plan.num_ladder]

    @cached_property
    def spaces(self) -> dict[str, tuple[str, ...]]:
        """Spaces in which the nearest training images are searched, and the key of their parts.

        "features" are those of the first network, "features_NAME" those of another.
        """
        spaces: dict[str, tuple[str, ...]] = {"pixels": ("nearest_pixels", "train")}
        for network in self.plan.networks:
            name = "features" if network is self.plan.networks[0] else f"features_{network.name}"
            spaces[name] = "nearest_features", "train", network.name
        return spaces

    def nearest(self, image_set: str, space: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the k nearest training images of each query: distances and indices, (N, k), nearest first."""
        parts = [
            (result[f"{image_set}_distances"], result[f"{image_set}_indices"])
            for result in self._results[self.spaces[space]]
        ]
        return neighbours.merge(parts, self.plan.config.nearest_images)

    @cached_property
    def nearest_distances(self) -> dict[str, dict[str, np.ndarray]]:
        """Distance of each query to its nearest training image, (N,): space -> image set."""
        return {
            space: {image_set: self.nearest(image_set, space)[0][:, 0] for image_set in self.plan.query_sets}
            for space in self.spaces
        }

    def digests(self) -> dict[str, str]:
        """Return the digest of each input artifact."""
        inputs = self.inputs
        digests = {
            "shards": inputs.shards.digest,
            "vqvae": inputs.codes.vqvae,
            "codes": inputs.codes.artifact.digest,
            "samples": inputs.samples.artifact.digest,
        }
        for level in inputs.codes.levels:
            digests[f"prior {level}"] = artifact.read(inputs.priors_folder / level, "prior", f"prior_{level}").digest
        return digests

    def report_data(self, metrics: Metrics, notes: list[str], fingerprint: str, provenance: str) -> ReportData:
        """Collect the contents of the report page. `provenance` is the relative path of a script: see ReportData."""
        inputs = self.inputs
        examples = self._results["examples", self.plan.reference][0]
        folders = {"VQ-VAE": inputs.vqvae_folder}
        folders |= {f"Prior of level {level}": inputs.priors_folder / level for level in inputs.codes.levels}
        curves_by_model = {name: curves.read(folder / curves.FILE) for name, folder in folders.items()}
        return ReportData(
            metrics=metrics,
            notes=notes,
            networks=self.plan.networks,
            image_size=inputs.shards.image_size,
            levels=inputs.codes.levels,
            originals=examples["images"],
            reconstructions={name: images for name, images in examples.items() if name != "images"},
            samples=self._samples_by_class(),
            rungs=self._rung_images(),
            codebooks=self._codebook_images(),
            nearest=self._nearest_images(),
            nearest_distances=self.nearest_distances,
            entry_counts=self.entry_counts,
            curves=curves_by_model,
            origin=describe_origin(inputs, self.plan, curves_by_model),
            provenance=provenance,
            settings={"seed": self.plan.seed, "evaluate": asdict(self.plan.config), "models": _network_meta(folders)},
            digests={**self.digests(), "evaluation": fingerprint},
        )

    def _samples_by_class(self) -> dict[str, SamplesOfClass]:
        """Read the first samples of each class, an even share of MAX_SAMPLES."""
        samples = self.inputs.samples
        names = list(samples.classes) or [""]
        labels = samples.labels if samples.classes else np.zeros(samples.count, np.int64)
        numbers = {name: np.flatnonzero(labels == label) for label, name in enumerate(names)}
        with_samples = [name for name in names if len(numbers[name])][:MAX_SAMPLES]
        limit = max(1, MAX_SAMPLES // len(with_samples))
        if samples.count <= MAX_SAMPLES:
            limit = MAX_SAMPLES
        return {
            name: SamplesOfClass(samples.read_images(numbers[name][:limit]), len(numbers[name]))
            for name in with_samples
        }

    def _rung_images(self) -> dict[str, np.ndarray]:
        """Return the first images of each rung of the quality ladder, (N, H, W, 3), by their names in the metrics."""
        if not self.plan.num_ladder:
            return {}
        rungs = ladder.rungs(self.inputs.codes.levels)
        image_sets = {name: self.plan.reference if name == "originals" else name for name in rungs}
        return {
            name: self._results["features", image_set, self.plan.networks[0].name][0]["shown"][: self.plan.num_ladder]
            for name, image_set in image_sets.items()
        }

    def _codebook_images(self) -> dict[str, np.ndarray]:
        """Return the decoded entries of each level, (K, H, W, 3), the most used in the training images first."""
        images = {}
        for level, counts in self.entry_counts.items():
            decoded = np.concatenate([result["images"] for result in self._results["codebook", level]])
            images[level] = decoded[np.argsort(-counts["train"], kind="stable")]
        return images

    def _nearest_images(self) -> list[NearestImages]:
        nearest = {space: self.nearest("samples", space)[1] for space in self.spaces}
        training_images = self.inputs.images("train")
        count = min(self.plan.config.samples_shown, self.plan.query_sets["samples"])
        samples = self.inputs.samples.images(0, count)

        def read(space: str, row: int) -> np.ndarray:
            indices = nearest[space][row]
            return np.stack([training_images.read(int(index)) for index in indices])

        return [
            NearestImages(sample, {space: read(space, row) for space in nearest}) for row, sample in enumerate(samples)
        ]

    def _first_parts(self, task: str, count: int | None) -> dict[tuple[str, ...], list[Result]]:
        """Return the results of a task; with `count`, those of the first images of the reference only."""
        return {
            key: [
                result for stop, result in zip(self._stops[key], results, strict=True) if count is None or stop <= count
            ]
            for key, results in self._results.items()
            if key[0] == task and (count is None or key[1] == self.plan.reference)
        }

    def _distortion_sums(self, count: int | None = None) -> dict[str, dict[str, DistortionSums]]:
        """Add up the parts: split -> prefix and fill, such as "top/zeros" -> sums. `count` as in `_first_parts`."""
        return {
            key[1]: {name: distortion.add(DistortionSums(*result[name]) for result in results) for name in results[0]}
            for key, results in self._first_parts("distortion", count).items()
        }

    def _codec_sums(self) -> dict[str, CodecSums]:
        """Add up the parts: codec and quality, such as "jpeg/50" -> sums."""
        results = self._results.get(("codecs", self.plan.reference), [])
        names = results[0] if results else ()
        return {name: codecs.add(codecs.from_list(result[name]) for result in results) for name in names}

    def _likelihood_sums(self, count: int | None = None) -> dict[str, dict[str, LikelihoodSums]]:
        """Add up the parts: level -> split -> sums. `count` as in `_first_parts`."""
        sums: dict[str, dict[str, LikelihoodSums]] = {level: {} for level in self.inputs.codes.levels}
        for (_, split, level), results in self._first_parts("likelihood", count).items():
            sums[level][split] = rate.add(LikelihoodSums(*result["sums"]) for result in results)
        return sums


def _network_meta(folders: Mapping[str, Path]) -> dict[str, Any]:
    """Read each model's network settings from its manifest."""
    manifests = {name: json.loads((folder / artifact.MANIFEST).read_bytes()) for name, folder in folders.items()}
    return {name: manifest["meta"]["network"] for name, manifest in manifests.items()}
