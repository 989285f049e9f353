"""What can be chosen about the networks. Plain data without torch, so that checking it costs nothing.

Every number of the paper has a field here; its values stand in conf/.
Source: Razavi et al. 2019, appendix tables of hyper-parameters.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

# What torch calls the parts of a network that holds the levels by name: it refuses these in words of its own.
OF_TORCH = frozenset(
    """
    add_module apply bfloat16 buffers call_super_init children clear compile cpu cuda double dump_patches eval
    extra_repr float forward get_buffer get_extra_state get_parameter get_submodule half ipu items keys load_state_dict
    modules mtia named_buffers named_children named_modules named_parameters parameters pop register_backward_hook
    register_buffer register_forward_hook register_forward_pre_hook register_full_backward_hook
    register_full_backward_pre_hook register_load_state_dict_post_hook register_load_state_dict_pre_hook
    register_module register_parameter register_state_dict_post_hook register_state_dict_pre_hook requires_grad_
    set_extra_state set_submodule share_memory state_dict to to_empty train training type update values xpu zero_grad
    """.split()  # noqa: SIM905
)
MODES = ("ema", "loss", "none")  # of a codebook
# Columns beside those of the levels in Parquet, and rows beside theirs in metrics.
OURS = frozenset({"key", "copy", "label", "total", "pixels"})


@dataclass(frozen=True)
class LevelConfig:
    """One grid of codes and the networks around it."""

    stride: int  # image pixels per code along each side, a power of two
    channels: int = 128  # width of the encoder and decoder ("hidden units")
    residual_channels: int = 64  # width inside a residual block ("residual units")
    residual_blocks: int = 2  # blocks per stack ("layers")
    entries: int = 512  # K, of the codebook
    dim: int = 64  # D, numbers per entry

    def __post_init__(self) -> None:
        if self.stride < 2 or self.stride & (self.stride - 1):
            raise ValueError(
                f"stride is {self.stride}; use a power of two, 2 or more, since a level halves the image some times"
            )
        for name in ("channels", "residual_channels", "dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; use 1 or more")
        if self.residual_blocks < 0:
            raise ValueError(f"residual_blocks is {self.residual_blocks}; use 0 or more")
        if self.entries < 2:
            raise ValueError(f"entries is {self.entries}; use 2 or more, for a code to choose between")
        if self.entries > 65_536:
            raise ValueError(f"entries is {self.entries}; codes are stored as 16-bit integers, so use at most 65536")


@dataclass(frozen=True)
class QuantizerConfig:
    """How a codebook is learnt, the same for every level."""

    mode: Literal["ema", "loss", "none"] = "ema"  # equation 3, equation 2, or continuous latents
    beta: float = 0.25  # weight of the commitment loss
    decay: float = 0.99  # of the moving averages of counts and sums (gamma)
    epsilon: float = 1e-5  # Laplace smoothing of the counts (epsilon)
    revive_every: int = 50  # steps between revivals of dead entries; 0 never revives
    revive_below: float = 0.05  # an entry is dead when chosen less often than this share of an even split

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}; use one of {', '.join(MODES)}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay is {self.decay}; use 0 (one Lloyd step) up to, but not, 1")
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"beta is {self.beta}; use 0 or more (the paper: 0.25)")
        if not 0 < self.epsilon < math.inf:
            raise ValueError(f"epsilon is {self.epsilon}; use a small positive number (the default: 1e-5)")
        if self.revive_every < 0 or not 0 <= self.revive_below < 1:
            raise ValueError(
                f"revive_every is {self.revive_every} and revive_below {self.revive_below}; "
                "use 0 or more steps and a share from 0 up to 1"
            )


@dataclass(frozen=True)
class VQVAEConfig:
    """A hierarchical VQ-VAE: its levels, coarse to fine, and how their codebooks learn."""

    levels: Mapping[str, LevelConfig]
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    level_dropout: float = 0.0  # share of training images decoded from a coarse prefix of levels; not in the paper

    def __post_init__(self) -> None:
        if not 0 <= self.level_dropout < 1:
            raise ValueError(f"level_dropout is {self.level_dropout}; use 0 (the paper) up to, but not, 1")
        if not self.levels:
            raise ValueError("levels is empty; name at least one, such as top: {stride: 8}")
        for name in self.levels:
            # It becomes a folder, a column, a part of the names of weights and of metrics.
            if not re.fullmatch("[a-z][a-z0-9_]*", name):
                raise ValueError(
                    f"a level is named {name!r}; use lower-case letters, digits and _, a letter first, such as top"
                )
            if name in OURS or name in OF_TORCH:
                raise ValueError(f"a level is named {name!r}, which has a meaning already; use another name")
        strides = [level.stride for level in self.levels.values()]
        if sorted(set(strides), reverse=True) != strides:
            named = ", ".join(f"{name} {level.stride}" for name, level in self.levels.items())
            raise ValueError(f"the strides of levels are {named}; list levels coarse to fine, each stride smaller")

    def grids(self, image_size: int) -> dict[str, int]:
        """Codes along each side, per level, of a square image."""
        coarsest = next(iter(self.levels.values())).stride
        if image_size < coarsest:
            raise ValueError(
                f"image_size is {image_size}; use the coarsest level's stride {coarsest}, or a multiple of it"
            )
        if image_size % coarsest:
            raise ValueError(
                f"image_size is {image_size}, which the coarsest level's stride {coarsest} does not divide; "
                f"use {image_size // coarsest * coarsest} or {(image_size // coarsest + 1) * coarsest}"
            )
        return {name: image_size // level.stride for name, level in self.levels.items()}


@dataclass(frozen=True)
class PriorConfig:
    """An autoregressive network over one level's codes, given the coarser ones and the label."""

    name: Literal["pixelsnail", "pixelcnn"]  # the file in models/priors/
    channels: int = 512  # "hidden units"
    residual_channels: int = 2048  # "residual units"
    layers: int = 20  # gated residual blocks
    attention_layers: int = 4  # spread evenly: after every layers / attention_layers blocks
    attention_heads: int = 8
    kernel_size: int = 5  # side of the causal convolutions' filter
    dropout: float = 0.1
    output_layers: int = 20  # residual 1x1 blocks on top
    condition_layers: int = 20  # residual blocks over the coarser codes

    def __post_init__(self) -> None:
        for name in ("channels", "residual_channels", "layers", "attention_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; use 1 or more")
        for name in ("attention_layers", "output_layers", "condition_layers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; use 0 or more")
        if self.attention_layers and self.layers % self.attention_layers:
            raise ValueError(
                f"layers is {self.layers}, which attention_layers {self.attention_layers} does not divide; "
                f"use a multiple of {self.attention_layers}, as attention follows blocks evenly, or attention_layers 0"
            )
        if self.attention_layers and self.channels % self.attention_heads:
            raise ValueError(
                f"channels is {self.channels}, which attention_heads {self.attention_heads} does not divide; use a multiple of {self.attention_heads}"
            )
        if self.kernel_size < 3 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {self.kernel_size}; use an odd side of 3 or more (the paper: 5)")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; use 0 up to, but not, 1")
