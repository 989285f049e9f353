"""Encoder and decoder of a VQ-VAE as graphs of other programs: `torch.export` (.pt2) and ONNX (.onnx).

    encoder   images, floats (N, 3, S, S) in [-1, 1]  ->  codes of each level, int64 (N, H, W), coarse to fine
    decoder   codes of each level, coarse to fine     ->  images, floats (N, 3, S, S), not clamped to [-1, 1]

The number of images N is free. Inputs are not checked: a code outside of its codebook is an error of the program.
N images, H x W codes of a level, D numbers per entry, K entries.
"""

import importlib.util
import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.vqvae import VQVAE, Level
from stages.errors import UserError
from stages.formats.artifact import atomic_write

PARTS = ("encoder", "decoder")
FORMATS = (".pt2", ".onnx")
EXAMPLE_IMAGES = 2  # with one image, the number would become a constant of the graph


class _Nearest(nn.Module):
    """Nearest entry of each latent vector, as `Quantizer` computes it, with what is constant computed once."""

    centre: Tensor
    codebook: Tensor
    squares: Tensor

    def __init__(self, level: Level) -> None:
        super().__init__()
        quantizer = level.quantizer
        centre = quantizer._centre()  # near the mean entry: distances from the origin would lose digits
        codebook = quantizer.codebook.detach() - centre
        self.register_buffer("centre", centre)
        self.register_buffer("codebook", codebook)
        self.register_buffer("squares", codebook.square().sum(1))

    def forward(self, latents: Tensor) -> Tensor:
        flat = latents.permute(0, 2, 3, 1).flatten(0, 2) - self.centre  # (N * H * W, D)
        codes = torch.addmm(self.squares, flat, self.codebook.T, alpha=-2).argmin(1)
        return codes.reshape(-1, *latents.shape[2:])


class _Encoder(nn.Module):
    def __init__(self, network: VQVAE) -> None:
        super().__init__()
        self.levels = nn.ModuleList(network.levels.values())
        self.nearest = nn.ModuleList(_Nearest(level) for level in self.levels)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features: list[Tensor] = []
        inputs = images
        for level in reversed(self.levels):
            inputs = level.encoder(inputs)  # type: ignore[operator]
            features.insert(0, inputs)
        codes: list[Tensor] = []
        lifted: list[Tensor] = []
        context: list[Tensor] = []
        for level, nearest, feature in zip(self.levels, self.nearest, features, strict=True):
            codes.append(nearest(level.project(torch.cat([*context, feature], 1))))  # type: ignore[operator]
            latents = [*lifted, _look_up(level, codes[-1])]
            context = [level.context(torch.cat(latents, 1))] if level.context is not None else []  # type: ignore[operator]
            lifted = level.lift(latents)  # type: ignore[operator]
        return tuple(codes)


class _Decoder(nn.Module):
    def __init__(self, network: VQVAE) -> None:
        super().__init__()
        self.levels, self.decoder = nn.ModuleList(network.levels.values()), network.decoder

    def forward(self, *codes: Tensor) -> Tensor:
        lifted: list[Tensor] = []
        for level, grid in zip(self.levels, codes, strict=True):
            lifted = level.lift([*lifted, _look_up(level, grid)])  # type: ignore[operator]
        return self.decoder(torch.cat(lifted, 1))


def _look_up(level: nn.Module, codes: Tensor) -> Tensor:
    return F.embedding(codes, level.quantizer.codebook).permute(0, 3, 1, 2)  # type: ignore[union-attr,arg-type]


def write_graph(network: VQVAE, part: str, path: Path, *, image_size: int) -> None:
    """Write the "encoder" or the "decoder" of a VQ-VAE to a file, in the format of its ending: .pt2 or .onnx.

    Raises UserError for another ending, and for .onnx without the packages that write it.
    """
    check_format(path)
    module: nn.Module = {"encoder": _Encoder, "decoder": _Decoder}[part](network).eval()
    batch = torch.export.Dim("images", min=1, max=1 << 16)
    codes = tuple(
        torch.zeros(EXAMPLE_IMAGES, side, side, dtype=torch.int64) for side in network.config.grids(image_size).values()
    )
    arguments = (torch.zeros(EXAMPLE_IMAGES, 3, image_size, image_size),) if part == "encoder" else codes
    dynamic = ({0: batch},) if part == "encoder" else (({0: batch},) * len(codes),)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it names the operators of packages that are not installed
    with torch.inference_mode():
        program = torch.export.export(module, arguments, dynamic_shapes=dynamic)
    names = list(network.config.levels)
    inputs, outputs = (["images"], names) if part == "encoder" else (names, ["images"])
    with atomic_write(path.absolute()) as temporary:
        if path.suffix == ".pt2":
            with temporary.open("wb") as file:
                torch.export.save(program, file)
        else:
            onnx_program = torch.onnx.export(
                program, dynamo=True, input_names=inputs, output_names=outputs, verbose=False
            )
            assert onnx_program is not None
            onnx_program.save(temporary)


def check_format(path: Path) -> None:
    """Raise UserError if no graph can be written to a path."""
    if path.suffix not in FORMATS:
        raise UserError(
            f"The file must end in {' or '.join(FORMATS)}, got {path.name}.",
            where=path,
            fix="Use .pt2 for torch.export.load, or .onnx for other programs.",
            code=2,
        )
    if not path.absolute().parent.is_dir():
        raise UserError(f"The folder of {path.name} does not exist.", where=path, fix="Create the folder.", code=2)
    missing = [name for name in ("onnx", "onnxscript") if path.suffix == ".onnx" and not importlib.util.find_spec(name)]
    if missing:
        raise UserError(
            f"Writing ONNX needs the package {missing[0]}.",
            where=path,
            fix="Install it: pip install onnx onnxscript. Or write a .pt2 file.",
            code=2,
        )
