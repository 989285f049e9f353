"""Trained network on disk: weights as safetensors, and the metadata to rebuild the network.

    model.safetensors   the weights; no pickle
    curves.csv          step,name,value: metrics during training
    *.png               previews from the trained network, such as reconstructions
    manifest.json       meta: the network's settings, the grids, the classes, and the digests of its training data

The digest of the folder (see artifact.py) identifies the model: codes store the digest of their VQ-VAE.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import pydantic
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.classifier import Classifier
from models.config import ClassifierConfig, PriorConfig, VQVAEConfig, plain_settings
from models.priors import Grid, Prior, build
from models.vqvae import VQVAE
from stages.errors import UserError, install_command
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
    images: Mapping[str, bytes],
) -> None:
    """Write a model folder of `kind` "vqvae", "prior" or "classifier". `images` are PNGs by name, without extension."""
    with artifact.commit_folder(folder, kind, dict(meta)) as out:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, out / WEIGHTS)
        curves.write(out / curves.FILE, history)
        for name, png in images.items():
            (out / f"{name}.png").write_bytes(png)


def load_vqvae(folder: Path) -> tuple[VQVAE, Artifact]:
    """Load a trained VQ-VAE in evaluation mode. Raises UserError if the folder is missing, damaged or incompatible."""
    model_artifact = artifact.read(folder, "vqvae", "vqvae")
    config = _network_config(VQVAEConfig, model_artifact.meta["network"], folder)
    return _load_weights(VQVAE(config), model_artifact), model_artifact


def load_prior(folder: Path, level: str) -> tuple[Prior, Artifact]:
    """Load a trained prior in evaluation mode. Raises UserError if the folder is missing, damaged or incompatible."""
    model_artifact = artifact.read(folder, "prior", f"prior_{level}")
    meta = model_artifact.meta
    config = _network_config(PriorConfig, meta["network"], folder)
    coarser = {name: Grid(**grid) for name, grid in meta["coarser"].items()}
    prior = build(
        config, entries=meta["entries"], grid=tuple(meta["grid"]), coarser=coarser, classes=len(meta["classes"])
    )
    return _load_weights(prior, model_artifact), model_artifact


def load_classifier(folder: Path, stage: str) -> tuple[Classifier, Artifact]:
    """Load a trained classifier, which `stage` writes, in evaluation mode. Raises UserError as `load_vqvae` does."""
    model_artifact = artifact.read(folder, "classifier", stage)
    config = _network_config(ClassifierConfig, model_artifact.meta["network"], folder)
    network = build_classifier(config, len(model_artifact.meta["classes"]))
    return _load_weights(network, model_artifact), model_artifact


def build_classifier(config: ClassifierConfig, classes: int) -> Classifier:
    """Build a classifier with random weights. Raises UserError if the package of a pretrained network is missing."""
    try:
        return Classifier(config, classes)
    except ImportError as error:
        raise UserError(
            f"The network {config.name} needs the package efficientnet-lite-pytorch, got none: {error}.",
            where="the Python environment",
            fix=f"Run: {install_command()}",
            code=3,
        ) from error


def network_meta(config: VQVAEConfig | PriorConfig | ClassifierConfig) -> dict[str, Any]:
    """Convert a network's settings to JSON for a manifest, without those at their neutral value, levels in order."""
    return json.loads(json.dumps(plain_settings(config)))


def _network_config(config_class: type, settings: Any, folder: Path) -> Any:
    try:
        return adapter(config_class).validate_json(json.dumps(settings), strict=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"The network's setting {'.'.join(map(str, first['loc']))} is not valid in this version: {first['msg']}.",
            where=folder / artifact.MANIFEST,
            fix="Train the model again with this version.",
            code=5,
        ) from error


def _load_weights(network: Network, model_artifact: Artifact) -> Network:
    model_artifact.verify(WEIGHTS)
    try:
        network.load_state_dict(load_file(model_artifact.path(WEIGHTS)))
    except (RuntimeError, SafetensorError) as error:
        raise UserError(
            "The weights do not match the network of this version.",
            where=model_artifact.path(WEIGHTS),
            fix="Train the model again with this version.",
            code=5,
        ) from error
    return network.eval().requires_grad_(False)
