"""Train a classifier on one set of images, and test it on the real validation images.

reads   images   shards: real images                formats/shards.py
                 vqvae: their reconstructions       formats/model_file.py
                 samples, accepted                  formats/samples.py
        shards   image shards                       formats/shards.py
writes  out      the trained classifier             formats/model_file.py
        metrics  accuracy                           formats/curves.py
        plots    training curves, ARTIFACT.csv      formats/curves.py

The classifier trained on the real images is the critic, by which the stage `reject` selects samples. The accuracy of
the classifier trained on samples is the classification accuracy score.
Source: Ravuri and Vinyals 2019, "Classification Accuracy Score for Conditional Generative Models", section 3.

B images per rank and step, H x W pixels, K classes.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.classifier import Classifier
from models.config import ClassifierConfig
from models.efficientnet import EfficientNetLite2
from models.quantizer import BatchSlice
from stages.config import AugmentConfig, ClassifierStageConfig
from stages.errors import UserError
from stages.formats import artifact, curves, model_file, pretrained
from stages.formats.shards import (
    INDEX,
    EncodedImage,
    IndexRow,
    ShardRef,
    Shards,
    open_shards,
    read_shard,
    write_index,
    write_shard,
)
from stages.formats.shards import KIND as SHARDS_KIND
from stages.formats.training_images import SampleImages, open_images
from stages.images.contact_sheet import encode_png
from stages.images.tensors import to_float, to_uint8
from stages.mapping.parts import map_parts
from stages.runtime.context import StageContext
from stages.runtime.device import best_device
from stages.runtime.verification import verify_once
from stages.training.checkpoint import Checkpoints
from stages.training.distributed import DistributedContext
from stages.training.labelled_batches import LabelledBatch, labelled_data
from stages.training.loop import TrainingLoop
from stages.training.objective import MetricSums, Objective, StepResult
from stages.training.ray_train import train_or_load

TOP_K = 5  # for top-5 accuracy: the label is among this many most probable classes
ACCURACIES = ("top1", "balanced_accuracy", "top5", "nats")  # of the validation images, in the file of metrics
RECONSTRUCTION_BATCH_SIZE = 64  # images


def run(
    images: Path,
    shards: Path,
    out: Path,
    metrics: Path,
    plots: Path,
    *,
    classifier: ClassifierStageConfig,
    augment: AugmentConfig,
    seed: int,
    context: StageContext,
) -> None:
    """Train on the images of an artifact; test on the validation images of the shards.

    Raises UserError if there are fewer than two classes, no labelled images to train or to test on, images of other
    classes than those of the shards, if an input is damaged, or if the weights of a pretrained network are missing.
    """
    dataset = open_shards(shards)
    verify_once(dataset.artifact)
    check_classes(dataset)
    network = build_network(classifier.network, len(dataset.classes))
    training_folder, is_vqvae = images, artifact.kind(images) == "vqvae"
    if is_vqvae:
        training_folder = context.work_dir / "reconstructions"
        write_reconstructions(dataset, images, training_folder, context)
    training_images = open_images(training_folder, dataset)
    if isinstance(training_images, SampleImages):
        verify_once(training_images.samples.artifact)
    if not np.any(training_images.labels >= 0):
        raise UserError(
            f"{images.name} must have labelled images to train the classifier on, got none.",
            where=images,
            fix="Label the training images (dataset.labels).",
            code=4,
        )
    arguments = {
        "images": training_folder.absolute(),
        "shards": shards.absolute(),
        "classifier": classifier,
        "augment": augment,
        "seed": seed,
    }
    history = train_or_load(train_worker, arguments, classifier.train, network=network, context=context)
    test_labels = dataset.split("validation").labels[: classifier.train.evaluate_images]
    meta = {
        "network": model_file.network_meta(classifier.network),
        "image_size": dataset.image_size,
        "classes": list(dataset.classes),
        "trained_on": images.name,
        "images": artifact.sha256(images / artifact.MANIFEST),
        "shards": dataset.digest,
    }
    model_file.write(out, "classifier", network.state_dict(), meta, history=history, images={})
    accuracy = curves.last(history)["validation"]
    majority = np.bincount(test_labels[test_labels >= 0]).max() / np.sum(test_labels >= 0)
    test_set = {"images": int(np.sum(test_labels >= 0)), "top1_most_frequent_class": float(majority)}
    curves.write_metrics(metrics, {name: accuracy[name] for name in ACCURACIES} | test_set)
    curves.write_curves_plot(plots / f"{images.name}.csv", history, {"nats": "nats", "top1": "top1"}, images.name)
    if is_vqvae:
        shutil.rmtree(training_folder)


def train_worker(
    *,
    dist: DistributedContext,
    context: StageContext,
    images: Path,
    shards: Path,
    classifier: ClassifierStageConfig,
    augment: AugmentConfig,
    seed: int,
) -> None:
    """Train in one process of `dist.world_size`."""
    dataset, config = open_shards(shards), classifier.train
    torch.manual_seed(seed)  # every rank initializes the same weights
    classes = len(dataset.classes)
    objective = ClassifierObjective(build_network(classifier.network, classes), classes)
    data = labelled_data(
        open_images(images, dataset),
        dataset.split("validation"),
        augment,
        config,
        seed=seed,
        dist=dist,
        loader_workers=context.cluster.loader_workers,
    )
    checkpoints = Checkpoints.for_stage(context, config.keep_checkpoints)
    TrainingLoop(
        objective, data, config, seed=seed, dist=dist, checkpoints=checkpoints, reporter=context.reporter
    ).run()


def build_network(config: ClassifierConfig, classes: int) -> Classifier:
    """Build the network to train. A pretrained trunk gets its published weights.

    Raises UserError if a package of a pretrained network is missing, of another version or damaged.
    """
    network = model_file.build_classifier(config, classes)
    if isinstance(network.features, EfficientNetLite2):
        network.features.load_published(pretrained.load_weights(config.name))
    return network


class ClassifierObjective(Objective):
    """Cross-entropy of the labels, top-1 and top-5 accuracy, and the balanced accuracy.

    The balanced accuracy is the mean over classes of the top-1 accuracy of a class's images, its recall. A classifier
    that gives every image the same class has 1 / K, however many images that class has.
    """

    network: Classifier

    def __init__(self, network: Classifier, classes: int):
        super().__init__()
        self.network, self.classes = network, classes

    def zero_metrics(self) -> MetricSums:
        totals = {name: torch.zeros(1) for name in ("images", "nats", "top1", "top5")}
        return totals | {name: torch.zeros(self.classes) for name in ("images_by_class", "top1_by_class")}

    def forward(self, batch: LabelledBatch, batch_slice: BatchSlice, dist: DistributedContext) -> StepResult:
        metrics = self.measure(self.network, batch, dist)
        loss = (metrics["nats"] / metrics["images"]).sum()
        return StepResult(loss, {}, metrics)

    def measure(self, network: nn.Module, batch: LabelledBatch, dist: DistributedContext) -> MetricSums:
        labels = batch.labels.to(dist.device)
        logits = network(to_float(batch.images, dist.device)).float()  # (B, K)
        hits = logits.topk(min(TOP_K, logits.shape[1])).indices == labels[:, None]  # (B, k), most probable class first
        images = torch.full((1,), float(len(labels)), device=dist.device)
        nats = F.cross_entropy(logits, labels, reduction="sum")
        one_hot = F.one_hot(labels, self.classes).float()  # (B, K)
        return {
            "images": images,
            "nats": nats[None],
            "top1": count(hits[:, :1]),
            "top5": count(hits),
            "images_by_class": one_hot.sum(dim=0),
            "top1_by_class": (one_hot * hits[:, :1]).sum(dim=0),
        }

    def summarize(self, sums: MetricSums) -> dict[str, float]:
        present = sums["images_by_class"] > 0
        recalls = sums["top1_by_class"][present] / sums["images_by_class"][present]
        totals = {name: (sums[name] / sums["images"]).item() for name in ("nats", "top1", "top5")}
        return totals | {"balanced_accuracy": recalls.mean().item()}


def count(hits: Tensor) -> Tensor:
    """Count True values: a float tensor of one value."""
    return hits.sum().float()[None]


def check_classes(dataset: Shards) -> None:
    """Raise UserError unless the shards have two classes and labelled validation images."""
    if len(dataset.classes) < 2:
        raise UserError(
            f"A classifier needs images of 2 or more classes, got {len(dataset.classes)}.",
            where=dataset.artifact.folder,
            fix="Set dataset.labels, or remove the sections classifiers and rejections.",
            code=2,
        )
    if not np.any(dataset.split("validation").labels >= 0):
        raise UserError(
            "A classifier is tested on labelled validation images, and these shards have none.",
            where=dataset.artifact.folder,
            fix="Set dataset.validation_fraction above 0.",
            code=2,
        )


def write_reconstructions(dataset: Shards, vqvae: Path, folder: Path, context: StageContext) -> None:
    """Write the VQ-VAE's reconstructions of the training images as shards, unless an interrupted run has done so."""
    if (folder / artifact.MANIFEST).is_file():
        return
    results_folder = context.work_dir / "parts"
    results_folder.mkdir(parents=True, exist_ok=True)
    parts = [{"shard": ref._asdict()} for ref in dataset.shard_refs() if ref.split == "train"]
    arguments = (vqvae.absolute(), results_folder.absolute())
    results = map_parts(Reconstruct, arguments, parts, context=context, unit="shard")
    meta = {"image_size": dataset.image_size, "classes": list(dataset.classes)}
    with artifact.commit_folder(folder, SHARDS_KIND, meta) as temporary:
        for part in parts:
            name = part["shard"]["shard"]
            artifact.link_or_copy(results_folder / name, temporary / name)
        write_index(temporary / INDEX, [[IndexRow(*row) for row in result["rows"]] for result in results])


class Reconstruct:
    """Mapper that writes the reconstructions of one shard, with a VQ-VAE loaded once per process."""

    def __init__(self, vqvae_folder: Path, results_folder: Path):
        self.device = best_device()
        self.network = model_file.load_vqvae(vqvae_folder)[0].to(self.device)
        self.results_folder = results_folder

    def __call__(self, part: dict[str, Any]) -> dict[str, Any]:
        ref = ShardRef(**part["shard"])
        path, rows_path = self.results_folder / ref.shard, self.results_folder / f"{ref.shard}.json"
        if not (artifact.has_valid_checksum(path) and artifact.has_valid_checksum(rows_path)):
            with artifact.atomic_write(path) as temporary:
                rows = self._write(ref, temporary)
            with artifact.atomic_write(rows_path) as temporary:
                temporary.write_text(json.dumps(rows), encoding="utf-8")
            for finished in (path, rows_path):
                artifact.write_checksum(finished)
        return {"rows": json.loads(rows_path.read_text(encoding="utf-8"))}

    @torch.inference_mode()
    def _write(self, ref: ShardRef, path: Path) -> list[IndexRow]:
        """Write a shard of reconstructions under the keys of the originals; return its rows of the index."""
        images = read_shard(ref)
        encoded = []
        for start in range(0, len(images), RECONSTRUCTION_BATCH_SIZE):
            positions = range(start, min(start + RECONSTRUCTION_BATCH_SIZE, len(images)))
            originals = torch.from_numpy(np.stack([images.read(position) for position in positions]))
            output = self.network(to_float(originals, self.device)).reconstruction.float().cpu().numpy()
            for position, image in zip(positions, to_uint8(output), strict=True):
                key, label = str(images.keys[position]), int(images.labels[position])
                encoded.append(EncodedImage(key, encode_png(image), "png", label, {}))
        locations = write_shard(path, encoded)
        return [
            IndexRow(
                image.key,
                "train",
                image.label,
                ref.shard,
                *locations[image.key],
                hashlib.sha256(image.data).hexdigest(),
                "",
            )
            for image in encoded
        ]
