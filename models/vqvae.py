"""Hierarchical VQ-VAE: images to grids of codes and back, for any number of levels.

Coarse levels hold what is global, finer ones what the coarser leave out: features rise from the pixels to the coarsest
level, then each level, coarsest first, is quantized knowing all coarser ones, and one decoder sees them all.
No normalisation layers. Source: Razavi et al. 2019, algorithm 1, figure 2a and the appendix tables.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from models.config import LevelConfig, VQVAEConfig
from models.quantizer import CodebookSums, Quantized, Quantizer, Share

FILLS = ("zeros", "mean")


class Output(NamedTuple):
    """A batch of images after the round trip."""

    reconstruction: Float[Tensor, "B 3 H W"]  # not clamped to the range of images
    levels: dict[str, Quantized]  # coarse to fine


class Loss(NamedTuple):
    """Equation 2, with means over pixels, positions and channels, and levels added."""

    total: Float[Tensor, ""]
    reconstruction: Float[Tensor, ""]  # mean squared error, in the units of the images
    commitment: Float[Tensor, ""]  # before its weight beta


class VQVAE(nn.Module):
    """The encoder, codebooks and decoder of every level.

    Under bf16 autocast the convolutions run in bf16; quantizing, the codebooks' statistics and the losses stay fp32.
    On a CPU `torch.channels_last` is the faster memory layout (benchmarks/vqvae.py).
    """

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.config = config
        names, levels = list(config.levels), list(config.levels.values())
        dims = [level.dim for level in levels]
        self.levels = nn.ModuleDict()
        for index, (name, level) in enumerate(config.levels.items()):
            finer = levels[index + 1] if index + 1 < len(levels) else None
            quantizer = Quantizer(config.quantizer, level.entries, level.dim, level=index)
            self.levels[name] = Level(level, finer, dims[: index + 1], quantizer)
        finest = levels[-1]
        self.decoder = decoder(finest, sum(dims), 3, finest.stride)
        self._ratios = {name: levels[0].stride // config.levels[name].stride for name in names}

    def forward(self, images: Float[Tensor, "B 3 H W"], share: Share | None = None) -> Output:
        """Reconstruct images, and say what they tell the codebooks, which stay as they are until `absorb`."""
        quantized, lifted = self._quantize(images, share)
        if self.training and self.config.level_dropout:
            lifted = self._lift(self._drop_levels({name: level.latents for name, level in quantized.items()}, share))
        return Output(self.decoder(torch.cat(lifted, 1)), quantized)

    def objective(self, output: Output, images: Float[Tensor, "B 3 H W"]) -> Loss:
        """Score reconstructions and codebooks by equation 2, in fp32."""
        reconstruction = F.mse_loss(output.reconstruction.float(), images.float())
        commitment = torch.stack([level.commitment for level in output.levels.values()]).sum()
        codebook = torch.stack([level.codebook for level in output.levels.values()]).sum()
        return Loss(reconstruction + codebook + self.config.quantizer.beta * commitment, reconstruction, commitment)

    def absorb(self, sums: Mapping[str, CodebookSums]) -> None:
        """Let each level's codebook learn from one step's sums over the global batch."""
        if set(sums) != set(self.levels):
            raise ValueError(
                f"sums are given of the levels {', '.join(sums) or '(none)'}, but this model learns "
                f"{', '.join(self.levels)}; give those of one step's output, all of them"
            )
        for name, level in self._named_levels():
            level.quantizer.absorb(sums[name])

    def encode(self, images: Float[Tensor, "B 3 H W"]) -> dict[str, Int64[Tensor, "B h w"]]:
        """Turn images into one grid of codes per level, coarse to fine."""
        quantized, _ = self._quantize(images)
        return {name: level.codes for name, level in quantized.items()}

    def decode(
        self, codes: Mapping[str, Int64[Tensor, "B h w"]], fill: Literal["zeros", "mean"] = "zeros"
    ) -> Float[Tensor, "B 3 H W"]:
        """Turn codes into images, which equal the reconstruction when every level is given.

        The finest levels may be absent: their latents are then zeros, or the mean entry as often as each is chosen.
        """
        if fill not in FILLS:
            raise ValueError(f"fill is {fill!r}; use {' or '.join(FILLS)}")
        self._check_codes(codes)
        coarsest = codes[next(iter(self.levels))]
        latents: dict[str, Tensor] = {}
        for name, level in self._named_levels():
            if name in codes:
                latents[name] = level.quantizer.lookup(codes[name])
            else:
                sides = [side * self._ratios[name] for side in coarsest.shape[1:]]
                mean = level.quantizer.mean().to(coarsest.device)
                stand_in = mean if fill == "mean" else torch.zeros_like(mean)
                latents[name] = stand_in[None, :, None, None].expand(len(coarsest), -1, *sides)
        return self.decoder(torch.cat(self._lift(latents), 1))

    def _lift(self, latents: Mapping[str, Float[Tensor, "B _ _ _"]]) -> list[Float[Tensor, "B _ h w"]]:
        """Bring every level's latents to the finest grid."""
        lifted: list[Tensor] = []
        for name, level in self._named_levels():
            lifted = level.lift([*lifted, latents[name]])
        return lifted

    def _drop_levels(
        self, latents: dict[str, Float[Tensor, "B _ _ _"]], share: Share | None
    ) -> dict[str, Float[Tensor, "B _ _ _"]]:
        """Leave some images a random coarse prefix of their levels, so that coarse codes learn to stand alone.

        The others become zeros, as `decode` fills them by default. Drawn for the whole global batch: a worker takes
        what falls to its images, whichever worker it is.
        """
        first = next(iter(latents.values()))
        start, total = (share.start, share.total) if share else (0, len(first))
        prefix = torch.randint(1, max(2, len(latents)), (total,), device=first.device)
        dropped = torch.rand(total, device=first.device) < self.config.level_dropout
        kept = torch.where(dropped, prefix, len(latents))[start : start + len(first), None, None, None]
        return {name: torch.where(kept > place, grid, 0) for place, (name, grid) in enumerate(latents.items())}

    def _quantize(
        self, images: Float[Tensor, "B 3 H W"], share: Share | None = None
    ) -> tuple[dict[str, Quantized], list[Tensor]]:
        """Quantize every level, coarsest first; give also all latents, lifted to the finest grid."""
        self._check_images(images)
        features: dict[str, Tensor] = {}
        finer = images
        for name, level in reversed(self._named_levels()):
            finer = features[name] = level.encoder(finer)

        quantized: dict[str, Quantized] = {}
        lifted: list[Tensor] = []
        seen: list[Tensor] = []  # what the coarser levels say about this one
        for name, level in self._named_levels():
            quantized[name] = level.quantizer(level.project(torch.cat([*seen, features[name]], 1)), share)
            known = [*lifted, quantized[name].latents]
            if level.context is not None:
                seen = [level.context(torch.cat(known, 1))]
            lifted = level.lift(known)
        return quantized, lifted

    def _named_levels(self) -> "list[tuple[str, Level]]":
        return list(self.levels.items())  # type: ignore[arg-type]

    def _check_images(self, images: Tensor) -> None:
        stride = next(iter(self.config.levels.values())).stride
        if images.ndim != 4 or images.shape[1] != 3 or not len(images):
            raise ValueError(f"images have shape {tuple(images.shape)}; use (1 or more, 3, height, width)")
        height, width = images.shape[2:]
        if height % stride or width % stride or not height or not width:
            raise ValueError(
                f"images are {height} x {width} pixels, but each side must be a multiple of the coarsest level's "
                f"stride {stride}; crop or pad to {-(-height // stride) * stride} x {-(-width // stride) * stride}"
            )

    def _check_codes(self, codes: Mapping[str, Tensor]) -> None:
        names = list(self.levels)
        if not codes or set(codes) != set(names[: len(codes)]):
            raise ValueError(
                f"codes hold the levels {', '.join(codes) or '(none)'}, but this model decodes {', '.join(names)}, "
                f"coarse to fine; give the first one, or more without a gap"
            )
        for name, grid in codes.items():
            coarsest = codes[names[0]]
            if grid.ndim != 3 or coarsest.ndim != 3:
                raise ValueError(f"codes of level {name} have shape {tuple(grid.shape)}; use (images, height, width)")
            if not grid.numel():
                raise ValueError(f"codes of level {name} have shape {tuple(grid.shape)}; give 1 or more of each")
            expected = (len(coarsest), *(side * self._ratios[name] for side in coarsest.shape[1:]))
            if tuple(grid.shape) != expected:
                raise ValueError(
                    f"codes of level {name} have shape {tuple(grid.shape)}, but beside {names[0]} of "
                    f"{tuple(coarsest.shape)} they must be {expected}; take all levels from the same images"
                )


class Level(nn.Module):
    """What belongs to one level of the hierarchy.

    `finer` is the next level, None for the finest; `dims` are the widths of all latents up to this level's own.
    """

    def __init__(self, config: LevelConfig, finer: LevelConfig | None, dims: list[int], quantizer: Quantizer) -> None:
        super().__init__()
        ratio = config.stride // finer.stride if finer else config.stride
        self.encoder = encoder(config, finer.channels if finer else 3, ratio)
        seen = config.dim if len(dims) > 1 else 0
        self.project = nn.Conv2d(seen + config.channels, config.dim, 1)
        self.quantizer = quantizer
        self.context = decoder(config, sum(dims), finer.dim, ratio) if finer else None
        self.lifts = nn.ModuleList(doublings([dim] * ratio.bit_length()) for dim in dims) if finer else nn.ModuleList()

    def lift(self, latents: list[Tensor]) -> list[Tensor]:
        """Bring this level's latents and the coarser ones' to the next finer grid."""
        return [lift(each) for lift, each in zip(self.lifts, latents, strict=True)] if self.lifts else latents


class Residual(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x)))). Source: van den Oord et al. 2017, section 4.1."""

    def __init__(self, channels: int, residual_channels: int) -> None:
        super().__init__()
        self.wide = nn.Conv2d(channels, residual_channels, 3, padding=1)
        self.narrow = nn.Conv2d(residual_channels, channels, 1)

    def forward(self, features: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return features + self.narrow(F.relu(self.wide(F.relu(features))))


def encoder(config: LevelConfig, channels_in: int, ratio: int) -> nn.Sequential:
    """Build the way from finer features, or pixels, to this level's features: halvings, then a residual stack."""
    half, halvings = max(config.channels // 2, 1), ratio.bit_length() - 1
    widths = [channels_in, half, *[config.channels] * (halvings - 1)]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, *_residual_stack(config, widths[-1]))


def decoder(config: LevelConfig, channels_in: int, channels_out: int, ratio: int) -> nn.Sequential:
    """Build the way from latents at this level's grid to one `ratio` times as fine, or to pixels."""
    half, halvings = max(config.channels // 2, 1), ratio.bit_length() - 1
    widths = [config.channels, *[half] * (halvings - 1), channels_out]
    return nn.Sequential(*_residual_stack(config, channels_in), *doublings(widths))


def doublings(widths: list[int]) -> nn.Sequential:
    """Build one transposed convolution per step between widths, each doubling both sides."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _residual_stack(config: LevelConfig, channels_in: int) -> list[nn.Module]:
    blocks = [Residual(config.channels, config.residual_channels) for _ in range(config.residual_blocks)]
    return [nn.Conv2d(channels_in, config.channels, 3, padding=1), *blocks, nn.ReLU()]
