"""Settings of the stages, as declared in params.yaml. Plain dataclasses: validating them imports neither torch nor Ray.

Batch sizes and steps are global: they do not depend on the number of workers. A field's comment is its entry in the
reference of settings: meaning, unit, range.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from models.config import (
    EXECUTION,
    NEUTRAL,
    ClassifierConfig,
    PriorConfig,
    VQVAEConfig,
    check_field,
    check_not_negative,
    check_positive,
    check_sampling_rule,
    plain_settings,
)
from stages.cluster_config import ClusterConfig

# Columns of the files of codes, and rows of the metrics, beside those of the levels.
RESERVED_LEVEL_NAMES = frozenset({"copy", "key", "label", "pixels", "total"})

# Feature networks whose weights come as a Python package, and the value of evaluate.networks that selects one.
INSTALLED_NETWORKS = ("efficientnet_lite0", "vgg16")
INSTALLED = "installed"


def _check_fraction(config: object, *names: str) -> None:
    for name in names:
        check_field(config, name, 0 <= getattr(config, name) <= 1, "a fraction from 0 to 1")


@dataclass(frozen=True)
class DatasetConfig:
    """Source of images, and their conversion to square RGB images of one size."""

    name: str  # name of the dataset, recorded in the manifest of the shards
    source: str  # path of a folder, a zip or a tar of images
    image_size: int  # side of the square images, in pixels, 1 or more
    # class of each image: "folders" (from folder names), "none", or the path of a CSV inside the source with a
    # column of image paths, one of classes and optionally one of splits
    labels: str = "folders"
    resize_mode: Literal["crop", "pad", "stretch"] = "crop"  # conversion of an image that is not square
    background: str = "#ffffff"  # colour under transparent pixels and around padded images: a name or #rrggbb
    image_format: Literal["png", "jpeg"] = "png"  # format of the images in shards; png is lossless
    jpeg_quality: int = 95  # JPEG quality, 1 to 100; used with image_format: jpeg
    # fraction of the images to hold out for validation, 0 to 1; used where the source names no validation images
    validation_fraction: float = 0.05
    images_per_shard: int = 1000  # images per shard, 1 or more
    max_rejected_fraction: float = 0.01  # the stage fails if more than this fraction of the images is rejected, 0 to 1
    max_pixels: int = 100_000_000  # a larger image, in pixels, is rejected before it is decoded; 1 or more

    def __post_init__(self) -> None:
        check_field(self, "source", bool(self.source.strip()), "a folder, a zip or a tar of images, such as images.zip")
        check_positive(self, "image_size", "images_per_shard", "max_pixels")
        _check_fraction(self, "validation_fraction", "max_rejected_fraction")
        check_field(self, "jpeg_quality", 1 <= self.jpeg_quality <= 100, "1 to 100")


@dataclass(frozen=True)
class AugmentConfig:
    """Random augmentation of training images, with new random numbers each time an image is used."""

    flip: bool = False  # flip left to right with probability 1/2
    max_shift: int = 0  # largest shift along each axis, in pixels, 0 or more; the edge pixels are repeated

    def __post_init__(self) -> None:
        check_not_negative(self, "max_shift")


@dataclass(frozen=True)
class TrainConfig:
    """Length and schedule of training, in optimizer steps over the global batch."""

    steps: int  # optimizer steps, 1 or more
    batch_size: int  # images per step over all workers, at least cluster.workers or the larger number of its range
    # "adam", as in the paper; "adamw" adds weight decay; "muon" orthogonalizes the updates of matrices,
    # and leaves embeddings, biases and the layer of the logits to AdamW
    optimizer: Literal["adam", "adamw", "muon"] = field(default="adam", metadata={NEUTRAL: "adam"})
    # decoupled weight decay of adamw and muon, relative to the learning rate, 0 or more
    weight_decay: float = field(default=0.0, metadata={NEUTRAL: 0.0})
    # root mean square of muon's updates, relative to the learning rate, above 0; about 0.3 for the VQ-VAE and
    # for networks with attention, which may diverge at 1
    muon_scale: float = field(default=1.0, metadata={NEUTRAL: 1.0})
    learning_rate: float = 3e-4  # learning rate after warm-up, above 0
    lr_schedule: Literal["constant", "cosine"] = "constant"  # after warm-up; cosine falls to almost 0 at the last step
    # first steps, in which the learning rate rises linearly from learning_rate / warmup_steps; 0 to steps
    warmup_steps: int = 0
    max_grad_norm: float = 0.0  # norm to which gradients are clipped, 0 or more; 0 does not clip
    ema_decay: float = (
        0.0  # decay per step of the weights' moving average, which is saved; 0 up to 1; 0 does not average
    )
    # dtype of matrix products and convolutions; statistics and losses stay float32
    precision: Literal["float32", "bfloat16"] = "float32"
    # images per worker in one forward and backward pass, whose gradients add up, 1 or more; fewer need less memory of
    # the GPU. null: a worker's whole share of the batch; auto: as many as fit. Another value continues an interrupted
    # training and retrains nothing; results differ by rounding, and with dropout by other draws
    microbatch: int | Literal["auto"] | None = field(default=None, metadata={EXECUTION: True})
    # compute activations inside of residual and gated blocks again in the backward pass instead of keeping them: much
    # less memory, about a third more time, and the same result. A change retrains nothing
    recompute_activations: bool = field(default=False, metadata={EXECUTION: True})
    compile: bool = False  # use torch.compile, which takes about a minute to start; worth it on a GPU
    log_every: int = 10  # steps between logged training metrics, 1 or more
    evaluate_every: int = 500  # steps between evaluations, 1 or more
    evaluate_images: int = 1024  # images per split and evaluation at most, 1 or more
    checkpoint_every: int = 500  # steps between checkpoints, 1 or more; see also cluster.checkpoint_every_minutes
    keep_checkpoints: int = 2  # newest checkpoints that are kept, 1 or more

    def __post_init__(self) -> None:
        check_positive(self, "steps", "batch_size", "keep_checkpoints")
        check_positive(self, "log_every", "evaluate_every", "evaluate_images", "checkpoint_every")
        if isinstance(self.microbatch, int):
            check_positive(self, "microbatch")
        check_field(self, "learning_rate", self.learning_rate > 0, "above 0, such as 3e-4")
        check_not_negative(self, "weight_decay")
        check_field(
            self,
            "weight_decay",
            self.optimizer != "adam" or not self.weight_decay,
            "0 with optimizer adam",
            "set optimizer to adamw, or weight_decay to 0",
        )
        check_field(self, "muon_scale", self.muon_scale > 0, "above 0, such as 0.3")
        check_field(
            self,
            "muon_scale",
            self.optimizer == "muon" or self.muon_scale == 1,
            f"1 with optimizer {self.optimizer}",
            "set optimizer to muon, or muon_scale to 1",
        )
        check_not_negative(self, "warmup_steps")
        check_field(
            self,
            "warmup_steps",
            self.warmup_steps <= self.steps,
            f"at most the number of steps, which is {self.steps}",
            f"set warmup_steps to at most {self.steps}, or increase steps in the same section",
        )
        check_not_negative(self, "max_grad_norm")
        check_field(self, "ema_decay", 0 <= self.ema_decay < 1, "0 or more and below 1")


@dataclass(frozen=True)
class CodesConfig:
    """Encoding of images into rows of codes."""

    copies: int = 1  # rows per training image, 1 or more: the original, and copies - 1 augmented ones
    batch_size: int = 64  # images encoded at once, 1 or more

    def __post_init__(self) -> None:
        check_positive(self, "copies", "batch_size")


@dataclass(frozen=True)
class PriorStageConfig:
    """Prior of one level: its network and its training."""

    network: PriorConfig  # architecture
    train: TrainConfig  # length and schedule of training


@dataclass(frozen=True)
class ClassifierStageConfig:
    """Classifier of images: its network and its training."""

    network: ClassifierConfig  # architecture
    train: TrainConfig  # length and schedule of training


SAMPLING_RULE = ("temperature", "top_k", "top_p", "guidance")  # settings that change which codes are drawn
RULE_SETTINGS = (*SAMPLING_RULE, "level_rules")


@dataclass(frozen=True)
class LevelRule:
    """Sampling rule of one level where it differs from that of the other levels; null: the same."""

    temperature: float | None = field(default=None, metadata={NEUTRAL: None})
    top_k: int | None = field(default=None, metadata={NEUTRAL: None})
    top_p: float | None = field(default=None, metadata={NEUTRAL: None})
    guidance: float | None = field(default=None, metadata={NEUTRAL: None})

    def __post_init__(self) -> None:
        SampleConfig(**{name: value for name, value in vars(self).items() if value is not None})  # checks the ranges


@dataclass(frozen=True)
class SampleConfig:
    """Number, classes and sampling rule of the samples."""

    count: int = 64  # images, 1 or more
    classes: tuple[str, ...] = ()  # classes of the samples in turn; empty: all classes
    # without classes: "proportional" draws each class as often as the training images have it, "equal" all in turn
    balance: Literal["proportional", "equal"] = field(default="proportional", metadata={NEUTRAL: "proportional"})
    temperature: float = 1.0  # divisor of the logits, above 0; below 1 favours probable codes
    top_k: int = 0  # sample from the k most probable entries, 0 or more; 0 keeps all
    top_p: float = 1.0  # sample from the fewest entries of this total probability, above 0 and at most 1; 1 keeps all
    # scale of classifier-free guidance, 0 or more; 1 is none; above 1 favours what the class makes likelier. Other than
    # 1 it doubles the work, and needs priors trained with label_dropout
    guidance: float = field(default=1.0, metadata={NEUTRAL: 1.0})
    # temperature, top_k, top_p or guidance of single levels, such as {bottom: {temperature: 0.8}}
    level_rules: Mapping[str, LevelRule] = field(default_factory=dict, metadata={NEUTRAL: {}})
    batch_size: int = 64  # images drawn at once, 1 or more; does not change the samples
    images_per_part: int = 1024  # images per file, 1 or more
    # "cached" computes each code from cached keys, values and activations; "naive" runs the network on the whole grid
    # for each code, with the same result
    method: Literal["cached", "naive"] = "cached"

    def __post_init__(self) -> None:
        check_positive(self, "count", "batch_size", "images_per_part")
        check_sampling_rule(self)
        check_field(self, "guidance", 0 <= self.guidance < math.inf, "a number, 0 or more")

    def rule(self, level: str) -> dict[str, Any]:
        """Return the sampling rule of a level: the keys of SAMPLING_RULE."""
        of_level = vars(self.level_rules.get(level, LevelRule()))
        return {name: getattr(self, name) if of_level[name] is None else of_level[name] for name in SAMPLING_RULE}

    def describe_rule(self) -> dict[str, Any]:
        """Return the sampling rule as plain data, without what is neutral: for the metadata of samples."""
        return {key: value for key, value in plain_settings(self).items() if key in RULE_SETTINGS}

    @classmethod
    def of_rule(cls, meta: Mapping[str, Any], **others: Any) -> "SampleConfig":
        """Return settings with the rule that `describe_rule` has put into metadata. Raises ValueError as the class."""
        settings = {name: meta[name] for name in SAMPLING_RULE if name in meta}
        level_rules = {level: LevelRule(**rule) for level, rule in meta.get("level_rules", {}).items()}
        return cls(**settings, level_rules=level_rules, **others)


@dataclass(frozen=True)
class RejectionConfig:
    """Rejection of samples by the probability that the critic, a classifier of real images, gives to their class."""

    acceptance: float = 0.5  # fraction of the samples of each class that is accepted, above 0 and at most 1
    # smallest probability of an accepted sample's class, 0 to 1; 0 accepts the whole fraction
    threshold: float = 0.0
    # fractions at which metrics are compared, above 0 and at most 1; all sets have as many images as the smallest one
    curve: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    batch_size: int = 64  # images scored at once, 1 or more

    def __post_init__(self) -> None:
        check_field(self, "acceptance", 0 < self.acceptance <= 1, "above 0 and at most 1")
        _check_fraction(self, "threshold")
        check_field(self, "curve", all(0 < rate <= 1 for rate in self.curve), "fractions above 0 and at most 1")
        check_positive(self, "batch_size")


@dataclass(frozen=True)
class EvaluateConfig:
    """Sizes of the evaluation."""

    batch_size: int = 64  # images per forward pass, 1 or more
    max_images: int = 2000  # images per split at most, 1 or more, for metrics that compare sets of images
    # split that image sets are compared with; auto is validation, or train with fewer than 64 validation images
    reference: Literal["auto", "train", "validation", "both"] = "auto"
    precision_recall_k: int = 3  # k of precision, recall, density and coverage: neighbours per image, 1 or more
    nearest_images: int = 3  # training images shown beside each sample, 1 or more
    search_images: int = 0  # training images searched for the nearest, the first ones, 0 or more; 0 searches all
    samples_shown: int = 8  # samples shown with their nearest training images, 1 or more
    # images of each rung of the quality ladder at most, 0 or more; the finer levels of these are drawn; 0 leaves it out
    ladder_images: int = 128
    # images compressed by JPEG, WebP and AVIF for the rate-distortion chart at most, 0 or more; 0 leaves these out
    codec_images: int = 64
    # feature networks by name; the first one's metrics are those of metrics/evaluate.json. A network is a TorchScript
    # file, or installed: efficientnet_lite0, or vgg16, which adds the perceptual distance ST-LPIPS to PSNR and SSIM
    networks: Mapping[str, str] = field(default_factory=lambda: {INSTALLED_NETWORKS[0]: INSTALLED})

    def __post_init__(self) -> None:
        check_positive(self, "batch_size", "max_images", "precision_recall_k", "nearest_images", "samples_shown")
        check_not_negative(self, "search_images", "ladder_images", "codec_images")
        check_field(self, "networks", bool(self.networks), "one or more feature networks, such as efficientnet_lite0")
        for name, weights in self.networks.items():
            if not re.fullmatch("[a-z][a-z0-9_]*", name):
                raise ValueError(
                    "networks must have names of lower-case letters, digits and underscores, because names of metrics "
                    f"end in them, got {name!r}; rename it, such as networks.inception"
                )
            if not weights or (weights == INSTALLED and name not in INSTALLED_NETWORKS):
                raise ValueError(
                    f"networks.{name} must be a TorchScript file, got {weights or 'nothing'}; "
                    f"set its path. Installed are: {', '.join(INSTALLED_NETWORKS)}"
                )


@dataclass(frozen=True)
class ComposedFrom:
    """Composition of params.yaml, recorded by Hydra; not for editing. It shows presets in `dvc exp show`."""

    choices: Mapping[str, Any] = field(default_factory=dict)  # chosen file of each group in conf/, by group
    overrides: tuple[str, ...] = ()  # overrides in the order in which they were given
    digest: str = ""  # digest of the composed settings; another one shows that params.yaml was edited


@dataclass(frozen=True)
class Params:
    """Sections of params.yaml."""

    seed: int  # seed of all random numbers, 0 to 2**63 - 1
    dataset: DatasetConfig
    vqvae: VQVAEConfig
    train_vqvae: TrainConfig
    codes: CodesConfig
    priors: Mapping[str, PriorStageConfig]
    sample: SampleConfig
    evaluate: EvaluateConfig
    cluster: ClusterConfig
    # classifiers by the artifact they are trained on: shards (real images; the critic), vqvae (their reconstructions),
    # samples, accepted; each is tested on real validation images; none by default
    classifiers: Mapping[str, ClassifierStageConfig]
    rejections: Mapping[str, RejectionConfig]  # rejection of samples, by the artifact: samples; none by default
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    keep_results: tuple[str, ...] = ()  # stages whose finished results stay valid although newer code computes others
    composed_from: ComposedFrom = field(default_factory=ComposedFrom)

    def __post_init__(self) -> None:
        check_field(self, "seed", 0 <= self.seed < 2**63, "0 or more and below 2**63")
        for name in self.vqvae.levels:
            if name in RESERVED_LEVEL_NAMES:
                reserved = ", ".join(sorted(RESERVED_LEVEL_NAMES))
                raise ValueError(f"vqvae.levels must be named other than {reserved}, got {name!r}; choose another name")
