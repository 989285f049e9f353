"""A trained network on disk: weights as safetensors, and beside them all that is needed to build it again.

    model.safetensors   the weights; no pickle
    curves.csv          step,name,value: what was measured while it learnt
    *.png               what it draws once it has learnt
    manifest.json       meta: the network's settings, the grids, the classes, and the digests of what it learnt from

The digest of the folder (see artifact.py) is the model's fingerprint: codes name the VQ-VAE that made them by it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import pydantic
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.config import PriorConfig, VQVAEConfig
from models.priors import Grid, Prior, build
from models.vqvae import VQVAE
from stages.errors import UserError
from stages.formats import artifact, curves
from stages.formats.artifact import Artifact
from stages.formats.config_schema import adapter

Network = TypeVar("Network", bound=nn.Module)
WEIGHTS = "model.safetensors"


def write(
    folder: Path,
    kind: str,
    state: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    *,
    history: list[dict[str, Any]],
    pictures: Mapping[str, bytes],
) -> None:
    """Commit a model folder of `kind` "vqvae" or "prior"."""
    with artifact.commit_folder(folder, kind, dict(meta)) as out:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, out / WEIGHTS)
        curves.write(out / curves.FILE, history)
        for name, png in pictures.items():
            (out / f"{name}.png").write_bytes(png)


def load_vqvae(folder: Path) -> tuple[VQVAE, Artifact]:
    """Build a trained VQ-VAE, ready to encode and decode."""
    found = artifact.read(folder, "vqvae", "vqvae")
    config = _config(VQVAEConfig, found.meta["network"], folder)
    return _with_weights(VQVAE(config), found), found


def load_prior(folder: Path, level: str) -> tuple[Prior, Artifact]:
    """Build a trained prior, ready to score and sample."""
    found = artifact.read(folder, "prior", f"prior_{level}")
    config = _config(PriorConfig, found.meta["network"], folder)
    meta = found.meta
    coarser = {name: Grid(**grid) for name, grid in meta["coarser"].items()}
    prior = build(
        config, entries=meta["entries"], grid=tuple(meta["grid"]), coarser=coarser, classes=len(meta["classes"])
    )
    return _with_weights(prior, found), found


def network_meta(config: VQVAEConfig | PriorConfig) -> dict[str, Any]:
    """A network's settings as they are kept in a manifest: JSON, levels in their order."""
    return json.loads(json.dumps(asdict(config)))


def _config(kind: type, settings: Any, folder: Path) -> Any:
    try:
        return adapter(kind).validate_json(json.dumps(settings), strict=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"The network's setting {'.'.join(map(str, first['loc']))} is not understood: {first['msg']}.",
            where=folder / artifact.MANIFEST,
            fix="Train the stage again with this version.",
            code=5,
        ) from error


def _with_weights(network: Network, found: Artifact) -> Network:
    found.verify(WEIGHTS)
    try:
        network.load_state_dict(load_file(found.path(WEIGHTS)))
    except (RuntimeError, SafetensorError) as error:
        raise UserError(
            "The weights do not fit this version's network.",
            where=found.path(WEIGHTS),
            fix="Train the stage again with this version.",
            code=5,
        ) from error
    return network.eval().requires_grad_(False)
