"""Hierarchical VQ-VAE: images to grids of codes and back, for any number of levels.

B images, H x W pixels or finest grid, h x w grid of one level, C channels, D numbers per latent vector.

    encode   pixels -> features of the finest level -> ... -> features of the coarsest level
    quantize coarsest level first; each level sees the quantized latents of all coarser ones
    decode   latents of all levels, brought to the finest grid -> pixels

Coarse levels hold global structure, finer levels hold what coarser ones omit. No normalization layers.
Source: Razavi et al. 2019, algorithm 1, figure 2a and the appendix tables.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from models.config import LevelConfig, VQVAEConfig
from models.quantizer import BatchSlice, CodebookSums, Quantized, Quantizer
from models.residual import ResidualBlock

FILLS = ("zeros", "mean")


class Output(NamedTuple):
    """Reconstruction of a batch of images, and each level's quantizer output."""

    reconstruction: Float[Tensor, "B 3 H W"]  # not clamped to the range of images
    levels: dict[str, Quantized]  # coarse to fine


class Loss(NamedTuple):
    """Terms of equation 2: means over pixels, positions and channels, summed over levels."""

    total: Float[Tensor, ""]
    reconstruction: Float[Tensor, ""]  # mean squared error, in the units of the images
    commitment: Float[Tensor, ""]  # before its weight beta


class VQVAE(nn.Module):
    """Encoders and codebooks of every level, and the decoder.

    Under bfloat16 autocast the convolutions run in bfloat16. Quantization, codebook statistics and losses stay float32.
    On a CPU `torch.channels_last` is the faster memory layout (benchmarks/vqvae.py).
    """

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.config = config
        names, levels = list(config.levels), list(config.levels.values())
        dims = [level.dim for level in levels]
        # The prefix avoids the names of ModuleDict's own attributes: a level may be named "forward" or "update".
        self.levels = nn.ModuleDict()
        for index, (name, level) in enumerate(config.levels.items()):
            finer = levels[index + 1] if index + 1 < len(levels) else None
            quantizer = Quantizer(config.quantizer, level.entries, level.dim, level=index)
            self.levels[f"level_{name}"] = Level(level, finer, dims[: index + 1], quantizer)
        finest = levels[-1]
        self.decoder = decoder(finest, sum(dims), 3, finest.stride)
        self._ratios = {name: levels[0].stride // config.levels[name].stride for name in names}

    def forward(self, images: Float[Tensor, "B 3 H W"], batch_slice: BatchSlice | None = None) -> Output:
        """Reconstruct images and sum codebook statistics. The codebooks do not change until `absorb`.

        Raises ValueError for images whose shape does not fit the levels.
        """
        quantized, lifted = self._quantize(images, batch_slice)
        if self.training and self.config.level_dropout:
            latents = {name: level.latents for name, level in quantized.items()}
            lifted = self._lift(self._drop_levels(latents, batch_slice))
        return Output(self.decoder(torch.cat(lifted, 1)), quantized)

    def objective(self, output: Output, images: Float[Tensor, "B 3 H W"]) -> Loss:
        """Compute the loss of equation 2, in float32."""
        reconstruction = F.mse_loss(output.reconstruction.float(), images.float())
        commitment = torch.stack([level.commitment for level in output.levels.values()]).sum()
        codebook = torch.stack([level.codebook for level in output.levels.values()]).sum()
        # Division by 1 is exact: the loss is that without it.
        scaled = reconstruction / self.config.image_variance
        return Loss(scaled + codebook + self.config.quantizer.beta * commitment, reconstruction, commitment)

    def absorb(self, sums: Mapping[str, CodebookSums]) -> None:
        """Update every level's codebook from the sums of one step over the global batch.

        Raises ValueError if the sums are not those of all levels.
        """
        names = self.config.levels.keys()
        if sums.keys() != names:
            raise ValueError(
                f"sums must be of the levels {', '.join(names)}, got {', '.join(sums) or 'none'}; "
                "use all sums of one output"
            )
        for name, level in self._named_levels():
            level.quantizer.absorb(sums[name])

    def encode(self, images: Float[Tensor, "B 3 H W"]) -> dict[str, Int64[Tensor, "B h w"]]:
        """Encode images as one grid of codes per level, coarse to fine.

        Raises ValueError for images whose shape does not fit the levels.
        """
        quantized, _ = self._quantize(images)
        return {name: level.codes for name, level in quantized.items()}

    def decode(
        self, codes: Mapping[str, Int64[Tensor, "B h w"]], fill: Literal["zeros", "mean"] = "zeros"
    ) -> Float[Tensor, "B 3 H W"]:
        """Decode codes to images. The codes of all levels give exactly the reconstruction.

        The finest levels may be missing. `fill` replaces their latents by zeros or by the mean entry. Raises ValueError
        for codes that do not fit the levels.
        """
        if fill not in FILLS:
            raise ValueError(f"fill must be {' or '.join(FILLS)}, got {fill!r}")
        self._check_codes(codes)
        coarsest = codes[next(iter(self.config.levels))]
        latents: dict[str, Tensor] = {}
        for name, level in self._named_levels():
            if name in codes:
                latents[name] = level.quantizer.lookup(codes[name])
            else:
                sides = [side * self._ratios[name] for side in coarsest.shape[1:]]
                mean = level.quantizer.mean().to(coarsest.device)
                vector = mean if fill == "mean" else torch.zeros_like(mean)
                latents[name] = vector[None, :, None, None].expand(len(coarsest), -1, *sides)
        return self.decode_latents(latents)

    def decode_latents(self, latents: Mapping[str, Float[Tensor, "B _ _ _"]]) -> Float[Tensor, "B 3 H W"]:
        """Decode latent vectors of all levels to images. Those of one forward pass give exactly its reconstruction."""
        return self.decoder(torch.cat(self._lift(latents), 1))

    def decode_prefixes(
        self, codes: Mapping[str, Int64[Tensor, "B _ _"]], fill: Literal["zeros", "mean"] = "zeros"
    ) -> list[Float[Tensor, "B 3 H W"]]:
        """Decode the coarsest level, the two coarsest, ..., all levels in `codes`: one batch of images for each.

        Raises ValueError for codes that do not fit the levels.
        """
        names = [name for name in self.config.levels if name in codes]
        prefixes = [names[:count] for count in range(1, len(names) + 1)]
        return [self.decode({name: codes[name] for name in prefix}, fill) for prefix in prefixes]

    def _lift(self, latents: Mapping[str, Float[Tensor, "B _ _ _"]]) -> list[Float[Tensor, "B _ H W"]]:
        """Bring every level's latents to the finest grid."""
        lifted: list[Tensor] = []
        for name, level in self._named_levels():
            lifted = level.lift([*lifted, latents[name]])
        return lifted

    def _drop_levels(
        self, latents: dict[str, Float[Tensor, "B _ _ _"]], batch_slice: BatchSlice | None
    ) -> dict[str, Float[Tensor, "B _ _ _"]]:
        """Keep only a random coarse prefix of the levels of some images, so that coarse codes alone decode to an image.

        The other levels become zeros, the default fill of `decode`. The random numbers are drawn for the global batch,
        and a worker uses those of its images: they do not depend on the number of workers.
        """
        coarsest = next(iter(latents.values()))
        start, total = (batch_slice.start, batch_slice.total) if batch_slice else (0, len(coarsest))
        prefix_lengths = torch.randint(1, max(2, len(latents)), (total,), device=coarsest.device)
        dropped = torch.rand(total, device=coarsest.device) < self.config.level_dropout
        num_levels = torch.where(dropped, prefix_lengths, len(latents))
        num_levels = num_levels[start : start + len(coarsest), None, None, None]
        return {name: torch.where(num_levels > index, grid, 0) for index, (name, grid) in enumerate(latents.items())}

    def _quantize(
        self, images: Float[Tensor, "B 3 H W"], batch_slice: BatchSlice | None = None
    ) -> tuple[dict[str, Quantized], list[Tensor]]:
        """Quantize every level, coarsest first (algorithm 1). Returns also all latents, at the finest grid."""
        self._check_images(images)
        # Bottom-up: each encoder reads the features of the next finer level.
        features: dict[str, Tensor] = {}
        inputs = images
        for name, level in reversed(self._named_levels()):
            inputs = features[name] = level.encoder(inputs)

        # Top-down: each quantizer sees its level's features and the context decoded from all coarser latents.
        quantized: dict[str, Quantized] = {}
        lifted: list[Tensor] = []  # latents of the coarser levels, at this level's grid
        context: list[Tensor] = []  # empty for the coarsest level
        for name, level in self._named_levels():
            latents = level.project(torch.cat([*context, features[name]], 1))
            quantized[name] = level.quantizer(latents, batch_slice)
            all_latents = [*lifted, quantized[name].latents]
            if level.context is not None:
                context = [level.context(torch.cat(all_latents, 1))]
            lifted = level.lift(all_latents)
        return quantized, lifted

    def _named_levels(self) -> "list[tuple[str, Level]]":
        return list(zip(self.config.levels, self.levels.values(), strict=True))  # type: ignore[arg-type]

    def _check_images(self, images: Tensor) -> None:
        stride = next(iter(self.config.levels.values())).stride
        if images.ndim != 4 or images.shape[1] != 3 or not len(images):
            raise ValueError(f"images must be of shape (1 or more, 3, height, width), got {tuple(images.shape)}")
        height, width = images.shape[2:]
        if height % stride or width % stride or not height or not width:
            next_height, next_width = (-(-side // stride) * stride for side in (height, width))
            raise ValueError(
                f"images must be multiples of {stride} pixels, the coarsest level's stride, along each side, "
                f"got {height} x {width}; crop or pad to {next_height} x {next_width}"
            )

    def _check_codes(self, codes: Mapping[str, Tensor]) -> None:
        names = list(self.config.levels)
        if not codes or set(codes) != set(names[: len(codes)]):
            raise ValueError(
                f"codes must be of the first level or more without a gap, of {', '.join(names)}, "
                f"got {', '.join(codes) or 'none'}"
            )
        for name, grid in codes.items():
            coarsest = codes[names[0]]
            if grid.ndim != 3 or coarsest.ndim != 3 or not grid.numel():
                raise ValueError(
                    f"codes of level {name} must be of shape (images, height, width), 1 or more each, "
                    f"got {tuple(grid.shape)}"
                )
            expected = (len(coarsest), *(side * self._ratios[name] for side in coarsest.shape[1:]))
            if tuple(grid.shape) != expected:
                raise ValueError(
                    f"codes of level {name} must be of shape {expected} to fit {names[0]} of {tuple(coarsest.shape)}, "
                    f"got {tuple(grid.shape)}; take all levels from the same images"
                )


class Level(nn.Module):
    """Networks of one level: encoder, projection to latents, quantizer, and upsampling to the next finer level.

    `finer` is the next level, None for the finest. `dims` are the widths of all latents from the coarsest to this
    level.
    """

    def __init__(self, config: LevelConfig, finer: LevelConfig | None, dims: list[int], quantizer: Quantizer) -> None:
        super().__init__()
        ratio = config.stride // finer.stride if finer else config.stride
        self.encoder = encoder(config, finer.channels if finer else 3, ratio)
        context_channels = config.dim if len(dims) > 1 else 0
        self.project = nn.Conv2d(context_channels + config.channels, config.dim, 1)
        self.quantizer = quantizer
        self.context = decoder(config, sum(dims), finer.dim, ratio) if finer else None
        self.lifts = nn.ModuleList(doublings([dim] * ratio.bit_length()) for dim in dims) if finer else nn.ModuleList()

    def lift(self, latents: list[Tensor]) -> list[Tensor]:
        """Bring this level's latents and the coarser ones' to the next finer grid. The finest level keeps its grid."""
        return [lift(grid) for lift, grid in zip(self.lifts, latents, strict=True)] if self.lifts else latents


def encoder(config: LevelConfig, channels_in: int, ratio: int) -> nn.Sequential:
    """Build an encoder from features or pixels to a grid smaller by `ratio`: halvings, then residual blocks."""
    half, halvings = max(config.channels // 2, 1), ratio.bit_length() - 1
    widths = [channels_in, half, *[config.channels] * (halvings - 1)]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, config.down_kernel_size, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, *_residual_stack(config, widths[-1]))


def decoder(config: LevelConfig, channels_in: int, channels_out: int, ratio: int) -> nn.Sequential:
    """Build a decoder from latents to a grid larger by `ratio`, or pixels: residual blocks, then doublings."""
    half, halvings = max(config.channels // 2, 1), ratio.bit_length() - 1
    widths = [config.channels, *[half] * (halvings - 1), channels_out]
    return nn.Sequential(*_residual_stack(config, channels_in), *doublings(widths))


def doublings(widths: list[int]) -> nn.Sequential:
    """Build one transposed convolution per step between widths, each doubling both sides, with ReLUs between them."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _residual_stack(config: LevelConfig, channels_in: int) -> list[nn.Module]:
    blocks = [ResidualBlock(config.channels, config.residual_channels) for _ in range(config.residual_blocks)]
    return [nn.Conv2d(channels_in, config.channels, 3, padding=1), *blocks, nn.ReLU()]
