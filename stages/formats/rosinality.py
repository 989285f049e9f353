"""Checkpoints of github.com/rosinality/vq-vae-2-pytorch: the state dict of its VQVAE class, as `vqvae_560.pt`.

The file is read as weights only, so it cannot run code. Its network is the same function as ours with these settings:

    bottom level of stride 4, top level of stride 8     encoders, decoders and residual blocks have the same layers
    top codes condition the bottom encoder and the decoder in the same order of channels
    pixels in [-1, 1], square images: resized, then cropped at the centre

All sizes are those of the tensors. Codebooks are stored there as (D, K) and here as (K, D).
K codebook entries, D numbers per entry.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.config import LevelConfig, QuantizerConfig, VQVAEConfig
from models.vqvae import VQVAE
from stages.errors import UserError

# Names there -> names here. `BLOCKS` are the layers of an encoder or decoder, which have the same numbers in both.
BLOCKS = {
    "enc_t.blocks": "levels.level_top.encoder",
    "enc_b.blocks": "levels.level_bottom.encoder",
    "dec_t.blocks": "levels.level_top.context",
    "dec.blocks": "decoder",
}
LAYERS = {
    "quantize_conv_t": "levels.level_top.project",
    "quantize_conv_b": "levels.level_bottom.project",
    "upsample_t": "levels.level_top.lifts.0.0",
}
RESIDUAL_LAYERS = {"conv.1": "conv3x3", "conv.3": "conv1x1"}
QUANTIZERS = {"quantize_t": "levels.level_top.quantizer", "quantize_b": "levels.level_bottom.quantizer"}
QUANTIZER_TENSORS = {"embed": "codebook", "embed_avg": "vectors", "cluster_size": "counts"}
# Words of PyTorch's error about a file with other objects than tensors.
OTHER_OBJECTS = ("Unsupported global", "unsupported GLOBAL", "Can only")
# Settings of its training that the file does not hold: the defaults of its code. It revives no entries.
QUANTIZER = QuantizerConfig(mode="ema", beta=0.25, decay=0.99, epsilon=1e-5, revive_every=0)


def read(path: Path) -> VQVAE:
    """Read a checkpoint of the VQ-VAE, in evaluation mode.

    Raises UserError if the file cannot be read, is a checkpoint of PixelSNAIL, or is not of that VQVAE class.
    """
    state = {name.removeprefix("module."): tensor for name, tensor in _load(path).items()}  # of distributed training
    try:
        config = _config(state)
        renamed = dict(_rename(state))
        network = VQVAE(config)
        # Buffers that are not in the file: the entries are in place, and none has been chosen since.
        for name in QUANTIZERS.values():
            renamed[f"{name}.window"] = torch.zeros_like(renamed[f"{name}.counts"])
            renamed[f"{name}.steps"] = torch.ones((), dtype=torch.int64)
        network.load_state_dict(renamed)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error).split("\n\t")[-1]
        raise _not_a_vqvae(path, reason) from error
    _check_values(network, path)
    return network.eval().requires_grad_(False)


def _load(path: Path) -> Mapping[str, Tensor]:
    """Load the tensors by name, without running code of the file."""
    if path.is_dir():
        raise UserError(
            f"{path.name} is a folder, not a file of weights.",
            where=path,
            fix="Give the path of the file, such as vqvae_560.pt in it.",
            code=4,
        )
    if not path.is_file():
        raise UserError(f"{path.name} does not exist.", where=path, fix="Correct the path.", code=4)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from error
    except Exception as error:  # of many libraries, by the kind of damage
        if "argparse.Namespace" in str(error):  # PixelSNAIL checkpoints hold the arguments of their command
            raise _is_pixelsnail(path) from error
        # PyTorch's own text is not repeated: it advises to load the file with the code that it may hold.
        if any(words in str(error) for words in OTHER_OBJECTS):
            raise _unreadable(path, "it holds other objects than tensors, which could run code") from error
        raise _unreadable(path, "it is damaged, or is no file of tensors") from error
    if isinstance(state, Mapping) and ("model" in state or any("causal" in str(name) for name in state)):
        raise _is_pixelsnail(path)
    if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise _not_a_vqvae(path, "it holds other values than tensors by name")
    if unnamed := [name for name in state if not isinstance(name, str)]:
        raise _unreadable(path, f"names of tensors must be text, got {unnamed[0]!r}")
    return state


def _config(state: Mapping[str, Tensor]) -> VQVAEConfig:
    """Return the settings whose network has tensors of these shapes."""
    levels = {}
    for level, stride, first_block in (("t", 8, 3), ("b", 4, 5)):
        encoder = f"enc_{level}.blocks"
        dim, entries = state[f"quantize_{level}.embed"].shape
        blocks = [name for name in state if re.fullmatch(rf"{encoder}\.\d+\.conv\.1\.weight", name)]
        residual = f"{encoder}.{first_block}.conv.1.weight"
        levels[level] = LevelConfig(
            stride=stride,
            channels=len(state[f"{encoder}.{first_block - 1}.weight"]),
            residual_channels=len(state[residual]) if blocks else 1,
            residual_blocks=len(blocks),
            entries=entries,
            dim=dim,
        )
    return VQVAEConfig({"top": levels["t"], "bottom": levels["b"]}, QUANTIZER)


def _rename(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors by our names. Raises ValueError for a name that is not of the VQVAE class."""
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        match = re.fullmatch(r"(\w+\.blocks)\.(\d+)(?:\.(conv\.\d))?", module)
        if module in QUANTIZERS and kind in QUANTIZER_TENSORS:
            yield f"{QUANTIZERS[module]}.{QUANTIZER_TENSORS[kind]}", tensor.float().t().contiguous()
        elif module in LAYERS:
            yield f"{LAYERS[module]}.{kind}", tensor
        elif match and match[1] in BLOCKS and (not match[3] or match[3] in RESIDUAL_LAYERS):
            layer = f".{RESIDUAL_LAYERS[match[3]]}" if match[3] else ""
            yield f"{BLOCKS[match[1]]}.{match[2]}{layer}.{kind}", tensor
        else:
            raise ValueError(f"it holds {name}")


def _check_values(network: VQVAE, path: Path) -> None:
    """Raise UserError for weights that no training gives: they would give NaN, or codes without meaning."""
    for name, tensor in network.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise _not_a_vqvae(path, f"{name} holds values that are not finite")
        if name.endswith(".counts") and not tensor.sum() > 0:
            raise _not_a_vqvae(path, "its codebooks have never been used: cluster_size is 0")


def _unreadable(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path.name} cannot be read as weights: {reason}.",
        where=path,
        fix="Use a file of tensors by name that train_vqvae.py of that repository has written, such as vqvae_560.pt.",
        code=5,
    )


def _is_pixelsnail(path: Path) -> UserError:
    return UserError(
        f"{path.name} is a PixelSNAIL checkpoint, which does not map to the priors of this project: it reads codes "
        "without an embedding, both convolutions of its blocks see k x k windows that end before their position, its "
        "attention reads the input and the output of a block and has no null key, and another network reads the top "
        "codes.",
        where=path,
        fix="Import the VQ-VAE (vqvae_560.pt) and train priors on its codes: docs/models.md",
        code=2,
    )


def _not_a_vqvae(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path.name} is not a checkpoint of the VQVAE class of rosinality/vq-vae-2-pytorch: {reason}.",
        where=path,
        fix="Use a file such as vqvae_560.pt, which train_vqvae.py of that repository writes.",
        code=5,
    )


def describe(path: Path, digest: str) -> dict[str, Any]:
    """Return the origin of an imported model, for its manifest."""
    return {"format": "rosinality/vq-vae-2-pytorch", "file": path.name, "sha256": digest}
