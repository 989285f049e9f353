"""What can be chosen about the stages. Plain data without torch or Ray, so that checking it costs nothing.

Batch sizes and steps are global: they do not change with the number of workers. `ClusterConfig` says where a
stage runs and never what it computes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from models.config import PriorConfig, VQVAEConfig


def _positive(config: object, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; use 1 or more")


def _fraction(config: object, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} is {getattr(config, name)}; use a fraction from 0 to 1")


@dataclass(frozen=True)
class DatasetConfig:
    """Which images, and how they become square RGB images of one size."""

    name: str
    source: str  # a folder, a zip or a tar of images
    image_size: int  # pixels along each side
    labels: str = "folders"  # "folders", "none", or a CSV with columns path,label and optionally split
    resize_mode: Literal["crop", "pad", "stretch"] = "crop"  # how an oblong image becomes square
    background: str = "#ffffff"  # under transparent pixels, and around padded ones
    image_format: Literal["png", "jpeg"] = "png"  # of images inside shards; png keeps every pixel
    jpeg_quality: int = 95  # of jpeg
    validation_fraction: float = 0.05  # of images, where the source has no split folders
    images_per_shard: int = 1000
    max_rejected_fraction: float = 0.01  # more unreadable images than this stop the stage
    max_pixels: int = 100_000_000  # a larger image is refused before it is decoded

    def __post_init__(self) -> None:
        if not self.source.strip():
            raise ValueError("source is empty; use a folder, a zip or a tar of images, such as images.zip")
        _positive(self, "image_size", "images_per_shard", "max_pixels")
        _fraction(self, "validation_fraction", "max_rejected_fraction")
        if not 1 <= self.jpeg_quality <= 100:
            raise ValueError(f"jpeg_quality is {self.jpeg_quality}; use 1 to 100")


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes of training images, drawn anew each time an image is used."""

    flip: bool = False  # left to right, half of the time
    max_shift: int = 0  # pixels, at most, along each side; edges repeat outwards

    def __post_init__(self) -> None:
        if self.max_shift < 0:
            raise ValueError(f"max_shift is {self.max_shift}; use 0 or more pixels")


@dataclass(frozen=True)
class TrainConfig:
    """How long to train and how, counted in optimizer steps over the global batch."""

    steps: int
    batch_size: int  # images per step, over all workers
    learning_rate: float = 3e-4
    lr_schedule: Literal["constant", "cosine"] = "constant"  # cosine falls to zero at the last step
    warmup_steps: int = 0  # the rate rises linearly from zero
    max_grad_norm: float = 0.0  # largest norm of the gradient; 0 does not clip
    ema_decay: float = 0.0  # decay of the weights' moving average, which is what is kept; 0 does not average
    precision: Literal["float32", "bfloat16"] = "float32"  # of the matrix products; statistics and losses stay float32
    compile: bool = False  # torch.compile; worth its minute on a GPU
    log_every: int = 10  # steps
    evaluate_every: int = 500  # steps
    evaluate_images: int = 1024  # at most, per split, each time
    checkpoint_every: int = 500  # steps
    keep_checkpoints: int = 2  # the newest so many

    def __post_init__(self) -> None:
        _positive(self, "steps", "batch_size", "keep_checkpoints")
        _positive(self, "log_every", "evaluate_every", "evaluate_images", "checkpoint_every")
        _fraction(self, "ema_decay")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; use a positive number such as 3e-4")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(f"warmup_steps is {self.warmup_steps}; use 0 up to steps, which is {self.steps}")
        if self.max_grad_norm < 0 or self.ema_decay == 1:
            raise ValueError(
                f"max_grad_norm is {self.max_grad_norm} and ema_decay {self.ema_decay}; use max_grad_norm 0 or more, ema_decay below 1"
            )


@dataclass(frozen=True)
class CodesConfig:
    """How images become rows of codes."""

    copies: int = 1  # rows per training image: the plain one, and augmented ones
    batch_size: int = 64  # images encoded at once

    def __post_init__(self) -> None:
        _positive(self, "copies", "batch_size")


@dataclass(frozen=True)
class PriorStageConfig:
    """One level's prior: the network, and how it is trained."""

    network: PriorConfig
    train: TrainConfig


@dataclass(frozen=True)
class SampleConfig:
    """What to draw from the priors."""

    count: int = 64  # images
    classes: tuple[str, ...] = ()  # drawn in turn; empty: every class, as often as the training images have it
    temperature: float = 1.0
    top_k: int = 0  # of the entries; 0 keeps all
    top_p: float = 1.0  # of the probability; 1 keeps all
    batch_size: int = 64  # images drawn at once; does not change them
    images_per_part: int = 1024  # images per file
    method: Literal["cached", "naive"] = "cached"  # naive runs the whole network for each code

    def __post_init__(self) -> None:
        _positive(self, "count", "batch_size", "images_per_part")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; use a positive number")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_k is {self.top_k} and top_p {self.top_p}; use top_k 0 or more, top_p above 0 up to 1"
            )


@dataclass(frozen=True)
class EvaluateConfig:
    """What to measure."""

    batch_size: int = 64
    max_images: int = 2000  # per split, for the measures that compare sets of images
    precision_recall_k: int = 3  # k of precision and recall
    nearest_images: int = 3  # training images shown beside each sample
    samples_shown: int = 8  # samples shown with their nearest training images
    feature_weights: str = ""  # a local file for the feature network; empty: the weights that are installed

    def __post_init__(self) -> None:
        _positive(self, "batch_size", "max_images", "precision_recall_k", "nearest_images", "samples_shown")


@dataclass(frozen=True)
class ClusterConfig:
    """Where a stage runs. Changing it reruns nothing."""

    workers: int = 1  # processes that train together, or read parts side by side
    cpus_per_worker: float = 2
    gpus_per_worker: float = 0
    loader_workers: int = 0  # processes per training worker that read images ahead; 0 reads in the worker
    max_failures: int = 2  # restarts of a failed worker group before giving up
    storage: str = ""  # where nodes meet that share no disk, such as s3://bucket/prefix; empty: they share the folder

    def __post_init__(self) -> None:
        _positive(self, "workers")
        if self.storage and "://" not in self.storage:
            raise ValueError(
                f"storage is {self.storage!r}; use a URL such as s3://bucket/prefix, or '' on a disk that all share"
            )
        if self.loader_workers < 0:
            raise ValueError(f"loader_workers is {self.loader_workers}; use 0 or more")
        if self.cpus_per_worker <= 0 or self.gpus_per_worker < 0 or self.max_failures < 0:
            raise ValueError(
                f"cpus_per_worker is {self.cpus_per_worker}, gpus_per_worker {self.gpus_per_worker} and max_failures "
                f"{self.max_failures}; use a positive number of CPUs and 0 or more of the others"
            )


@dataclass(frozen=True)
class Params:
    """The whole of params.yaml, section by section."""

    seed: int
    dataset: DatasetConfig
    vqvae: VQVAEConfig
    train_vqvae: TrainConfig
    codes: CodesConfig
    priors: Mapping[str, PriorStageConfig]
    sample: SampleConfig
    evaluate: EvaluateConfig
    cluster: ClusterConfig
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; use 0 or more, below 2**63")
