"""Measure what was learnt, and lay it out as one page.

reads   shards   image shards                          formats/shards.py
        vqvae    the trained VQ-VAE                    formats/model_file.py
        codes    one row of codes per image            formats/codes.py
        priors   a folder of trained priors, by level  formats/model_file.py
        samples  images drawn from the priors          formats/samples.py
writes  out      report.html, and its pictures beside it
        metrics  every number, as JSON
        plots    rate against distortion, likelihoods and codebook usage, as CSV

Networks run over at most `max_images` of each split, in the shards' order, which mixes classes; codes and bytes are
counted over all. Sets of images are compared at one number of images N, beside two controls: what the decoder makes
of uniformly random codes, and of codes that trade places between images.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from stages.config import EvaluateConfig
from stages.errors import UserError
from stages.evaluation import summary
from stages.evaluation.report import Report, write_report
from stages.evaluation.summary import Numbers
from stages.evaluation.worker import SETS, Inputs, Measurer, Plan
from stages.formats import artifact, curves
from stages.mapping.parts import Part, Result, map_parts
from stages.metrics import distortion, neighbours, rate, usage
from stages.metrics.distortion import DistortionSums
from stages.metrics.features import network_name
from stages.metrics.rate import LikelihoodSums
from stages.runtime.context import StageContext

IMAGES_PER_PART = 256
FEWEST_REFERENCE = 64  # validation images; where there are fewer, training images are the reference
QUERY_BYTES = 2**28  # of the images whose nearest training images are looked for: every worker holds them
RECONSTRUCTIONS_SHOWN = 8
SAMPLES_SHOWN = 64  # without classes
CLASSES_SHOWN = 16
SHOWN_PER_CLASS = 8


def run(
    shards: Path,
    vqvae: Path,
    codes: Path,
    priors: Path,
    samples: Path,
    out: Path,
    metrics: Path,
    plots: Path,
    *,
    evaluate: EvaluateConfig,
    seed: int,
    context: StageContext,
) -> None:
    """Measure the models and their samples against the images they learnt from and those they never saw."""
    inputs = Inputs(*(folder.absolute() for folder in (shards, vqvae, codes, priors, samples)))
    inputs.check()
    plan = _plan(inputs, evaluate, seed)
    work = (context.work / "parts").absolute()
    work.mkdir(parents=True, exist_ok=True)
    parts = list(_parts(inputs, plan))
    results = map_parts(Measurer, (asdict(inputs), plan, work), parts, context=context, unit="image")
    found = EvaluationResults(inputs, plan, parts, results)

    numbers = found.numbers()
    notes = summary.notes(numbers, plan.compared, evaluate)
    for note in notes:
        context.reporter.note(note)
    context.reporter.metrics(summary.flat(numbers), 0)
    meta: dict[str, Any] = {"inputs": found.digests(), "settings": asdict(evaluate), "seed": seed}
    with artifact.commit_folder(out, "report", meta) as folder:
        for name, png in write_report(folder, found.report(numbers, notes, context.fingerprint)).items():
            context.reporter.picture(name, png, 0)
    curves.write_metrics(metrics, numbers)
    summary.write_plots(plots, numbers, found.counts)


def _plan(inputs: Inputs, config: EvaluateConfig, seed: int) -> Plan:
    sizes = {split: len(inputs.images(split)) for split in ("train", "validation")}
    few = sizes["validation"] < min(FEWEST_REFERENCE, sizes["train"])
    reference = "train" if few else "validation"
    compared = min(inputs.samples.count, sizes[reference], config.max_images)
    if not compared:
        raise UserError(
            f"There is nothing to compare: {inputs.samples.count} samples, {sizes[reference]} {reference} images.",
            where=inputs.samples_folder,
            fix="Set sample.count to 1 or more, and give images that can be read: see the report of rejected ones.",
            code=4,
        )
    queries = max(1, min(compared, QUERY_BYTES // (3 * inputs.shards.image_size**2)))
    return Plan(reference, compared, queries, min(RECONSTRUCTIONS_SHOWN, sizes[reference]), config, seed)


def _parts(inputs: Inputs, plan: Plan) -> Iterator[Part]:
    """Cut the work into ranges of images; what takes longest comes first."""
    limit = plan.config.max_images
    sizes = {split: len(inputs.images(split)) for split in ("train", "validation")}
    bounded = {split: min(limit, size) for split, size in sizes.items() if size}
    levels = list(inputs.codes.levels)
    yield from _ranges("features", "train", bounded["train"])
    for of in ("validation", *SETS) if plan.reference == "validation" else SETS:
        yield from _ranges("features", of, plan.compared)
    for split, size in bounded.items():
        for level in reversed(levels):
            yield from _ranges("likelihood", f"{split}.{level}", size)
    for split, size in bounded.items():
        yield from _ranges("distortion", split, size)
    for of in _queries(plan):
        yield from _ranges("nearest", of, sizes["train"])
    yield from _ranges("shown", plan.reference, plan.shown)


def _ranges(measure: str, of: str, size: int) -> Iterator[Part]:
    for start in range(0, size, IMAGES_PER_PART):
        stop = min(start + IMAGES_PER_PART, size)
        yield {"measure": measure, "of": of, "start": start, "stop": stop, "weight": stop - start}


def _queries(plan: Plan) -> tuple[str, ...]:
    """The sets whose nearest training images are looked for: held-out images say how near is normal."""
    return ("samples", "validation") if plan.reference == "validation" else ("samples",)


class EvaluationResults:
    """What all parts measured, put together."""

    def __init__(self, inputs: Inputs, plan: Plan, parts: Sequence[Part], results: Sequence[Result]):
        self.inputs, self.plan = inputs, plan
        self.network = network_name(plan.config.feature_weights)
        self._results: dict[str, dict[str, list[Result]]] = {}
        for part, result in zip(parts, results, strict=True):
            self._results.setdefault(part["measure"], {}).setdefault(part["of"], []).append(result)

    def numbers(self) -> Numbers:
        """Every number of the evaluation, under the heading that says what it measures."""
        levels, shards = self.inputs.codes.levels, self.inputs.shards
        likelihoods = summary.likelihood(self._likelihoods(), levels)
        reconstruction = summary.reconstruction(self._distortions())
        reference = self.plan.reference
        column_bytes, rows = rate.column_bytes(self.inputs.codes_folder / name for name in self.inputs.codes.files())
        sets = {name: self.features(name) for name in SETS}
        compared = summary.comparisons(
            {
                **{name: (self.features(reference)[: self.plan.compared], features) for name, features in sets.items()},
                # As the paper's FID*: the decoder's part is on both sides.
                "samples_to_reconstructions": (sets["reconstructions"], sets["samples"]),
            },
            self.network,
            self.plan.config,
            self.plan.seed,
        )
        return {
            "seed": self.plan.seed,
            "reference": reference,
            "num_images": {split: len(shards.split(split)) for split in ("train", "validation")}
            | {"samples": self.inputs.samples.count, "compared": self.plan.compared},
            "reconstruction": reconstruction,
            "codebook": summary.codebook(self.counts),
            "likelihood": likelihoods,
            "rate": summary.rates(
                levels,
                likelihoods,
                reconstruction[reference]["mse"],
                split=reference,
                image_size=shards.image_size,
                column_bytes=column_bytes,
                rows=rows,
            ),
            "compared": {**compared, **summary.ratios(compared, self.network)},
            "neighbours": summary.memorization(self.distances),
        }

    @cached_property
    def counts(self) -> dict[str, dict[str, np.ndarray]]:
        """How often every entry occurs: level -> split -> counts, over all plain images."""
        codes = self.inputs.codes
        splits = [split for split in codes.splits if split in ("train", "validation")]
        counts: dict[str, dict[str, np.ndarray]] = {
            level: {split: np.zeros(shape.entries, np.int64) for split in splits}
            for level, shape in codes.levels.items()
        }
        for split in splits:
            for part in codes.parts(split):
                for level, grids in part.plain().codes.items():
                    counts[level][split] += usage.count(grids, len(counts[level][split]))
        return counts

    def features(self, of: str) -> np.ndarray:
        return np.concatenate([result["features"] for result in self._results["features"][of]])

    def nearest(self, of: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The nearest training images of a set: space -> distances and indices, nearest first."""
        k = self.plan.config.nearest_images
        pixels = neighbours.merge(
            [(result["distances"], result["indices"]) for result in self._results["nearest"][of]], k
        )
        queries = self.features(of)[: self.plan.queries]
        return {"pixels": pixels, "features": neighbours.nearest(queries, self.features("train"), k)}

    @cached_property
    def distances(self) -> dict[str, dict[str, np.ndarray]]:
        """How far each image's nearest training image is: space -> set -> distances."""
        found = {of: self.nearest(of) for of in _queries(self.plan)}
        return {space: {of: spaces[space][0][:, 0] for of, spaces in found.items()} for space in ("pixels", "features")}

    def digests(self) -> dict[str, str]:
        """The digest of every artifact that was measured."""
        inputs = self.inputs
        found = {
            "shards": inputs.shards.digest,
            "vqvae": inputs.codes.vqvae,
            "codes": inputs.codes.found.digest,
            "samples": inputs.samples.found.digest,
        }
        for level in inputs.codes.levels:
            found[f"prior {level}"] = artifact.read(inputs.priors_folder / level, "prior", f"prior_{level}").digest
        return found

    def report(self, numbers: Numbers, notes: list[str], fingerprint: str) -> Report:
        """Gather what the page shows."""
        inputs = self.inputs
        shown = self._results["shown"][self.plan.reference][0]
        pictures = {name: found for name, found in shown.items() if name != "images"}
        folders = {"VQ-VAE": inputs.vqvae_folder}
        folders |= {f"prior of level {level}": inputs.priors_folder / level for level in inputs.codes.levels}
        return Report(
            numbers=numbers,
            notes=notes,
            network=self.network,
            image_size=inputs.shards.image_size,
            levels=inputs.codes.levels,
            originals=shown["images"],
            reconstructions=pictures,
            samples=self._samples_by_class(),
            nearest=self._nearest_shown(),
            distances=self.distances,
            counts=self.counts,
            curves={name: curves.read(folder / curves.FILE) for name, folder in folders.items()},
            settings={"seed": self.plan.seed, "evaluate": asdict(self.plan.config), "models": self._settings(folders)},
            digests={**self.digests(), "evaluation": fingerprint},
        )

    def _samples_by_class(self) -> dict[str, np.ndarray]:
        samples = self.inputs.samples
        if not samples.classes:
            return {"": samples.images(0, min(samples.count, SAMPLES_SHOWN))}
        places = {name: np.flatnonzero(samples.labels == label) for label, name in enumerate(samples.classes)}
        drawn = [(name, found[:SHOWN_PER_CLASS]) for name, found in places.items() if len(found)][:CLASSES_SHOWN]
        return {name: samples.images_of(found) for name, found in drawn}

    def _nearest_shown(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Some samples, each with its nearest training images by pixels and by features."""
        found, train = self.nearest("samples"), self.inputs.images("train")
        count = min(self.plan.config.samples_shown, self.plan.queries)
        images = self.inputs.samples.images(0, count)

        def pictures(space: str, row: int) -> np.ndarray:
            return np.stack([train.read(int(place)) for place in found[space][1][row]])

        return [(images[row], pictures("pixels", row), pictures("features", row)) for row in range(count)]

    def _distortions(self) -> dict[str, dict[str, DistortionSums]]:
        return {
            split: {name: distortion.add([DistortionSums(*result[name]) for result in results]) for name in results[0]}
            for split, results in self._results["distortion"].items()
        }

    def _likelihoods(self) -> dict[str, dict[str, LikelihoodSums]]:
        sums: dict[str, dict[str, LikelihoodSums]] = {level: {} for level in self.inputs.codes.levels}
        for of, results in self._results["likelihood"].items():
            split, level = of.split(".", 1)
            sums[level][split] = rate.add([LikelihoodSums(*result["sums"]) for result in results])
        return sums

    def _settings(self, folders: Mapping[str, Path]) -> dict[str, Any]:
        manifests = {name: json.loads((folder / artifact.MANIFEST).read_bytes()) for name, folder in folders.items()}
        return {name: manifest["meta"]["network"] for name, manifest in manifests.items()}
