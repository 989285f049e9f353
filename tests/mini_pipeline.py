"""Small pipeline for tests: the real stages in one process, without Ray."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models.config import ClassifierConfig, LevelConfig, PriorConfig, VQVAEConfig
from stages import classifier, codes, evaluate, prior, reject, sample, shard, vqvae
from stages.config import (
    AugmentConfig,
    ClassifierStageConfig,
    ClusterConfig,
    CodesConfig,
    DatasetConfig,
    EvaluateConfig,
    PriorStageConfig,
    RejectionConfig,
    SampleConfig,
    TrainConfig,
)
from stages.runtime.context import StageContext
from stages.training import ray_train
from stages.training.distributed import DistributedContext

NETWORK = VQVAEConfig({"top": LevelConfig(8, 8, 4, 1, 16, 4), "bottom": LevelConfig(4, 8, 4, 1, 16, 4)})
TRAIN = TrainConfig(steps=12, batch_size=4, ema_decay=0.5, log_every=2, evaluate_every=6, checkpoint_every=4)
PRIORS = {
    "top": PriorConfig("pixelsnail", 8, 8, 2, 1, 2, 3, 0.1, 1, 1, label_dropout=0.2),
    "bottom": PriorConfig("pixelcnn", 8, 8, 2, 0, 1, 3, 0.1, 1, 1, label_dropout=0.2),
}
CLASSIFIER = ClassifierStageConfig(ClassifierConfig(channels=4, halvings=1, blocks=1), TRAIN)
AUGMENT = AugmentConfig(flip=True, max_shift=1)


class MiniPipeline:
    """Folder of artifacts, and methods that run the stages on it with small networks and images.

    `out` is the name of the output under artifacts/. Another `fingerprint` is another work folder, so the stage starts
    from scratch.
    """

    network, augment, train, priors = NETWORK, AUGMENT, TRAIN, PRIORS

    def __init__(self, folder: Path):
        self.folder = folder

    @classmethod
    def build(cls, folder: Path) -> "MiniPipeline":
        """Run every stage from images to samples."""
        pipeline = cls(folder)
        pipeline.shard()
        pipeline.vqvae()
        pipeline.codes()
        for level in PRIORS:
            pipeline.prior(level)
        pipeline.sample()
        return pipeline

    def run(self, stage: str, fingerprint: str = "f") -> StageContext:
        """Return the context to run a stage in."""
        work = self.folder / "runs" / stage / fingerprint
        work.mkdir(parents=True, exist_ok=True)
        return StageContext(stage, fingerprint, work, ClusterConfig())

    def path(self, name: str) -> Path:
        """Return the path of an artifact."""
        return self.folder / "artifacts" / name

    def files(self, stage: str) -> tuple[Path, Path]:
        """Return the file of a stage's metrics and the folder of its plots."""
        return self.folder / f"metrics/{stage}.json", self.folder / f"plots/{stage}"

    def shard(self) -> None:
        """Write 12 training and 4 validation images of the classes dark and light, and shard them."""
        source = self.folder / "images"
        random = np.random.default_rng(0)
        for split, count in (("train", 12), ("validation", 4)):
            for number in range(count):
                shade = "light" if number % 2 else "dark"
                path = source / split / shade / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = random.integers(0, 128, (16, 16, 3)) + (127 if shade == "light" else 0)
                Image.fromarray(pixels.astype(np.uint8)).save(path)
        dataset = DatasetConfig("shades", str(source), 16, images_per_shard=5)
        shard.run(source, self.path("shards"), self.files("shard")[0], dataset=dataset, context=self.run("shard"))

    def vqvae(self, seed: int = 0, out: str = "vqvae", fingerprint: str = "f") -> None:
        vqvae.run(
            self.path("shards"), self.path(out), *self.files("vqvae"),
            vqvae=NETWORK, augment=AUGMENT, train_vqvae=TRAIN, seed=seed, context=self.run("vqvae", fingerprint),
        )  # fmt: skip

    def codes(self, copies: int = 2, out: str = "codes", fingerprint: str = "f") -> None:
        codes.run(
            self.path("shards"), self.path("vqvae"), self.path(out),
            codes=CodesConfig(copies=copies, batch_size=3), augment=AUGMENT, seed=0,
            context=self.run("codes", fingerprint),
        )  # fmt: skip

    def prior(self, level: str, codes: str = "codes", out: str = "priors", fingerprint: str = "f") -> None:
        settings = PriorStageConfig(PRIORS[level], TRAIN)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(self.folder / "cache"))
            prior.run(
                level, self.path(codes), self.path(out) / level, *self.files(f"prior_{level}"),
                prior=settings, seed=0, context=self.run(f"prior@{level}", fingerprint),
            )  # fmt: skip

    def sample(self, out: str = "samples", fingerprint: str = "f", **settings: Any) -> None:
        config = SampleConfig(**{"count": 10, "images_per_part": 4, "batch_size": 3} | settings)
        sample.run(
            self.path("vqvae"), self.path("priors"), self.path(out), sample=config, seed=0,
            context=self.run("sample", fingerprint),
        )  # fmt: skip

    def evaluate(self, out: str = "report", fingerprint: str = "f") -> None:
        evaluate.run(
            *map(self.path, ("shards", "vqvae", "codes", "priors", "samples", out)), *self.files("evaluate"),
            evaluate=EvaluateConfig(), seed=0, context=self.run("evaluate", fingerprint),
        )  # fmt: skip

    def classifier(self, images: str = "shards", out: str = "classifiers", fingerprint: str = "f") -> None:
        classifier.run(
            self.path(images), self.path("shards"), self.path(out) / images,
            self.files(f"classifier_{images}")[0], self.files("classifiers")[1],
            classifier=CLASSIFIER, augment=AUGMENT, seed=0, context=self.run(f"classifier@{images}", fingerprint),
        )  # fmt: skip

    def reject(self, out: str = "accepted", fingerprint: str = "f", **settings: Any) -> None:
        config = RejectionConfig(**{"acceptance": 0.5, "curve": (1.0, 0.5), "batch_size": 3} | settings)
        reject.run(
            *map(self.path, ("samples", "shards", "classifiers/shards", out)), *self.files("reject_samples"),
            rejection=config, evaluate=EvaluateConfig(), seed=0, context=self.run("reject@samples", fingerprint),
        )  # fmt: skip


def map_serially(
    mapper: Callable[..., Any], arguments: tuple[Any, ...], parts: list[Any], *, context: StageContext, unit: str
) -> list[Any]:
    """Replace `map_parts` without Ray: call the mapper in this process on parts that went through JSON."""
    instance = mapper(*arguments)
    return [instance(json.loads(json.dumps(part))) for part in parts]


def fit_in_process(train_worker: Callable[..., None], arguments: dict[str, Any], *, context: StageContext) -> None:
    """Replace `fit` without Ray: train with one worker in this process."""
    train_worker(dist=DistributedContext(), context=context, **arguments)


@contextmanager
def without_ray(fit: Callable[..., None] = fit_in_process) -> Iterator[None]:
    """Replace the stages' two uses of Ray, mapping and training, by loops in this process, or training by `fit`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_train, "fit", fit)
        for stage in (shard, codes, sample, evaluate, classifier, reject):
            patch.setattr(stage, "map_parts", map_serially)
        yield
