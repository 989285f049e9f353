"""Accept the samples of each class that the critic scores highest; compute metrics at several acceptance rates.

reads   samples  candidates                         formats/samples.py
        shards   real images, as the reference      formats/shards.py
        critic   classifier of the real images      formats/model_file.py
writes  out      accepted samples                   formats/samples.py, and
                 scores.csv: every candidate's score; acceptance-RATE.png: samples compared at each rate of the curve
        metrics  counts and mean scores             formats/curves.py
        plots    metrics by acceptance, as CSV      formats/curves.py

This is a stage after `sample`, so that another acceptance rate needs no new samples, and a project without rejection no
critic.

Axes: N samples, H x W pixels, 3 RGB channels, D features.
"""

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.classifier import Classifier
from stages.config import EvaluateConfig, RejectionConfig
from stages.errors import UserError
from stages.evaluation import summary
from stages.evaluation.inputs import choose_references
from stages.evaluation.part_files import load_or_compute
from stages.evaluation.rejection import CurvePoint, accept, curve_rows, plan_curve
from stages.formats import artifact, curves, model_file
from stages.formats.artifact import Artifact
from stages.formats.codes import write_codes_file
from stages.formats.samples import KIND, Samples, open_samples
from stages.formats.shards import EncodedImage, open_shards, write_shard
from stages.images.contact_sheet import contact_sheet, encode_png
from stages.images.tensors import to_float
from stages.mapping.parts import Part, Result, map_parts
from stages.metrics.features import FeatureNetwork
from stages.metrics.inception_score import inception_score
from stages.metrics.networks import Network, read_networks
from stages.metrics.threads import one_thread
from stages.runtime.context import StageContext
from stages.runtime.device import best_device
from stages.runtime.verification import verify_once

IMAGES_PER_PART = 256  # what an interrupted run computes again at most, per worker
SAMPLES_PER_FILE = 1024
SHEET_ROWS, SHEET_COLUMNS = 8, 8  # of a contact sheet: samples of a class, classes
CRITIC_STAGE = "classifier_shards"  # trains the critic


def run(
    samples: Path,
    shards: Path,
    critic: Path,
    out: Path,
    metrics: Path,
    plots: Path,
    *,
    rejection: RejectionConfig,
    evaluate: EvaluateConfig,
    seed: int,
    context: StageContext,
) -> None:
    """Score the samples, accept the best of each class, and compute metrics at each rate of `rejection.curve`.

    Raises UserError if an input is damaged, if the critic was trained on other classes than the samples', or if no
    sample is accepted.
    """
    candidates, dataset = open_samples(samples), open_shards(shards)
    verify_once(candidates.artifact)
    _, critic_artifact = model_file.load_classifier(critic, CRITIC_STAGE)  # fails now rather than on a worker
    check_critic(candidates, critic_artifact)
    results_folder = (context.work_dir / "parts").absolute()
    results_folder.mkdir(parents=True, exist_ok=True)
    network = first_network(evaluate)
    inputs = (samples.absolute(), shards.absolute(), critic.absolute())

    def map_all(parts: list[Part]) -> list[Result]:
        arguments = (*inputs, network, rejection, evaluate, results_folder)
        return map_parts(RejectionWorker, arguments, parts, context=context, unit="image")

    scores = np.concatenate([result["scores"] for result in map_all(list(_parts("scores", range(candidates.count))))])
    labels = candidates.labels
    accepted = accept(scores, labels, rejection.acceptance, rejection.threshold)
    if not len(accepted):
        raise UserError(
            f"No sample scores {rejection.threshold:g} or more; the best scores {scores.max():.3g}.",
            where=samples,
            fix="Lower rejections.samples.threshold, or train longer.",
            code=4,
        )
    sizes = {split: len(dataset.split(split)) for split in ("train", "validation")}
    reference, *_ = choose_references(evaluate.reference, sizes)
    max_images = min(evaluate.max_images, len(dataset.split(reference)))
    points = plan_curve(scores, labels, rejection.curve, max_images, seed)
    features = _features(points, reference, map_all)
    with one_thread():  # what this process computes is the same on any number of processors
        by_rate = compare(points, features, FeatureNetwork(network), evaluate, seed)
    meta = {
        **candidates.artifact.meta,
        "count": len(accepted),
        "accepted": len(accepted) / candidates.count,
        "acceptance": rejection.acceptance,
        "threshold": rejection.threshold,
        "critic": critic_artifact.digest,
        "candidates": candidates.artifact.digest,
    }
    with artifact.commit_folder(out, KIND, meta) as folder:
        write_accepted(folder, candidates, accepted)
        write_scores(folder / "scores.csv", candidates, scores, accepted)
        for point in points:
            sheet = draw_by_class(candidates, point.compared)
            (folder / f"acceptance-{point.rate:g}.png").write_bytes(sheet)
        (folder / "grid.png").write_bytes(draw_by_class(candidates, accepted))
    context.reporter.image("accepted", (out / "grid.png").read_bytes(), 0)
    mean_scores = {"candidates": float(scores.mean()), "accepted": float(scores[accepted].mean())}
    curves.write_metrics(
        metrics, {"candidates": candidates.count, "accepted": len(accepted), "mean_score": mean_scores}
    )
    curves.write_plot(plots / f"{samples.name}.csv", *curve_rows(points, scores, by_rate))


class RejectionWorker:
    """Mapper of parts whose `task` is "scores" (of samples, by the critic) or "features" (of an image set).

    An image set is "samples" or a split of the shards. Each process loads a network on first use.
    """

    def __init__(
        self,
        samples_folder: Path,
        shards_folder: Path,
        critic_folder: Path,
        network: Network,
        rejection: RejectionConfig,
        evaluate: EvaluateConfig,
        results_folder: Path,
    ):
        self.samples, self.rejection, self.evaluate = open_samples(samples_folder), rejection, evaluate
        self.results_folder = results_folder
        self.device = best_device()
        self.split_images = cache(lambda name: open_shards(shards_folder).split(name))
        self.critic_network = cache(lambda: model_file.load_classifier(critic_folder, CRITIC_STAGE)[0].to(self.device))
        self.feature_network = cache(lambda: FeatureNetwork(network, self.device))

    def __call__(self, part: Part) -> Result:
        path = self.results_folder / f"{part['task']}-{part['image_set']}-{part['number']:05d}.safetensors"
        return load_or_compute(path, lambda: self._compute(part))

    def _compute(self, part: Part) -> Result:
        if part["task"] == "scores":
            return self.scores(part["positions"])
        return self.features(part["image_set"], part["positions"])

    def scores(self, positions: list[int]) -> Result:
        """Compute the probability that the critic gives to each sample's class: (N,) float32."""
        batches = [
            class_probabilities(self.critic_network(), self.samples.read_images(batch), self.samples.labels[batch])
            for batch in _batches(positions, self.rejection.batch_size)
        ]
        return {"scores": np.concatenate(batches)}

    def features(self, image_set: str, positions: list[int]) -> Result:
        """Compute the features, (N, D) float32, of samples or of the images of a split."""
        network, batches = self.feature_network(), []
        for batch in _batches(positions, self.evaluate.batch_size):
            if image_set == "samples":
                images = self.samples.read_images(batch)
            else:
                images = np.stack([self.split_images(image_set).read(position) for position in batch])
            batches.append(network(images))
        return {"features": np.concatenate(batches)}


def class_probabilities(network: Classifier, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Compute the probability of each image's label, (N,) float32; images are (N, H, W, 3) uint8."""
    device = next(network.parameters()).device
    probabilities = network.probabilities(to_float(torch.from_numpy(images), device)).cpu().numpy()
    return probabilities[np.arange(len(labels)), labels]


def check_critic(candidates: Samples, critic_artifact: Artifact) -> None:
    """Raise UserError if the critic was not trained on images of the samples' classes and size."""
    expected, actual = (
        (list(candidates.classes), candidates.image_size),
        (critic_artifact.meta["classes"], critic_artifact.meta["image_size"]),
    )
    if expected != actual:
        raise UserError(
            f"The critic must know the {len(expected[0])} classes of the samples, at {expected[1]} pixels, got "
            f"{len(actual[0])} classes at {actual[1]} pixels.",
            where=critic_artifact.folder,
            fix=f"Run: vqvae2 run --stage {CRITIC_STAGE}",
            code=5,
        )


def _features(
    points: Sequence[CurvePoint], reference: str, map_all: Callable[[list[Part]], list[Result]]
) -> dict[str, dict[int, np.ndarray]]:
    """Compute the features of all images to compare: "samples" or "reference" -> position -> features (D,)."""
    if not points:
        return {}
    numbers = np.unique(np.concatenate([point.compared for point in points]))
    parts = [*_parts("features", numbers), *_parts("features", range(len(points[0].compared)), reference)]
    features: dict[str, dict[int, np.ndarray]] = {}
    for part, result in zip(parts, map_all(parts), strict=True):
        role = "samples" if part["image_set"] == "samples" else "reference"
        features.setdefault(role, {}).update(zip(part["positions"], result["features"], strict=True))
    return features


def first_network(evaluate: EvaluateConfig) -> Network:
    """Return the first feature network of the evaluation."""
    return read_networks(evaluate.networks)[0].absolute()


def compare(
    points: Sequence[CurvePoint],
    features: dict[str, dict[int, np.ndarray]],
    network: FeatureNetwork,
    evaluate: EvaluateConfig,
    seed: int,
) -> dict[float, dict[str, Any]]:
    """Compute the metrics of the compared samples at each rate: rate -> name of the metric -> value."""
    if not points:
        return {}
    reference = np.stack(list(features["reference"].values()))
    feature_pairs = {
        f"{point.rate}": (reference, np.stack([features["samples"][number] for number in point.compared.tolist()]))
        for point in points
    }
    by_name = summary.comparisons(feature_pairs, network.network, evaluate, seed)
    for name, (_, compared) in feature_pairs.items():
        if (probabilities := network.probabilities(compared)) is not None:
            by_name[name][f"is_{network.name}"] = inception_score(probabilities)
    return {point.rate: by_name[f"{point.rate}"] for point in points}


def write_accepted(folder: Path, candidates: Samples, accepted: np.ndarray) -> None:
    """Write the accepted candidates as samples, numbered from 0 in the candidates' order."""
    classes = candidates.classes
    for start in range(0, len(accepted), SAMPLES_PER_FILE):
        numbers = accepted[start : start + SAMPLES_PER_FILE]
        rows = candidates.codes.take(numbers)
        keys = [f"{start + index:09d}" for index in range(len(numbers))]
        name = f"samples-{start // SAMPLES_PER_FILE:05d}"
        write_codes_file(
            folder / f"{name}.parquet",
            candidates.levels, rows.codes, rows.labels, rows.copies, keys, {"vqvae": candidates.vqvae},
        )  # fmt: skip
        encoded = (
            EncodedImage(key, encode_png(image), "png", int(label), {"class": classes[label]})
            for key, image, label in zip(keys, candidates.read_images(numbers), rows.labels, strict=True)
        )
        write_shard(folder / f"{name}.tar", encoded)


def write_scores(path: Path, candidates: Samples, scores: np.ndarray, accepted: np.ndarray) -> None:
    """Write the class and the score of each candidate, and the number of the accepted sample that it became."""
    new_numbers = {int(number): index for index, number in enumerate(accepted)}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["candidate", "class", "score", "accepted_as"])
        for number, (label, score) in enumerate(zip(candidates.labels, scores, strict=True)):
            writer.writerow([number, candidates.classes[label], f"{score:.9g}", new_numbers.get(number, "")])


def draw_by_class(candidates: Samples, numbers: np.ndarray) -> bytes:
    """Draw a contact sheet of the first of these samples of each class, one column per class."""
    by_class = [numbers[candidates.labels[numbers] == label] for label in range(len(candidates.classes))]
    columns = [of_class for of_class in by_class if len(of_class)][:SHEET_COLUMNS]
    rows = min(SHEET_ROWS, min(map(len, columns)))
    shown = np.stack([of_class[:rows] for of_class in columns], axis=1)  # (rows, columns)
    return contact_sheet(candidates.read_images(shown.reshape(-1)), columns=len(columns))


def _parts(task: str, positions: Iterable[int], image_set: str = "samples") -> Iterator[Part]:
    """Yield the parts of a task on the images at some positions of an image set."""
    for number, batch in enumerate(_batches([int(position) for position in positions], IMAGES_PER_PART)):
        yield {
            "task": task, "image_set": image_set, "number": number, "positions": batch, "weight": len(batch)
        }  # fmt: skip


def _batches(positions: list[int], batch_size: int) -> Iterator[list[int]]:
    for start in range(0, len(positions), batch_size):
        yield positions[start : start + batch_size]
