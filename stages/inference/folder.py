"""Model folder: a VQ-VAE in vqvae/, its priors in priors/, and the default sampling rule in samples/ or config.json."""

import json
from pathlib import Path

from stages.config import RULE_SETTINGS, SampleConfig
from stages.errors import UserError
from stages.formats import model_file
from stages.formats.samples import open_samples
from stages.inference.trained_models import TrainedModels

CONFIG = "config.json"  # of an exported model
CONFIG_FORMAT = 1
MODEL_IN_MLFLOW = "model"  # name of the exported model in a model of MLflow


def find_model(folder: Path) -> Path:
    """Return the model folder: `folder`, or that of a project or of a model of MLflow.

    Raises UserError if none of them holds a VQ-VAE.
    """
    for candidate in (folder, folder / "artifacts", folder / "artifacts" / MODEL_IN_MLFLOW):
        if (candidate / "vqvae").is_dir():
            return candidate
    state = "a folder without them" if folder.is_dir() else "no folder"
    raise UserError(
        f"A model must be a folder that holds vqvae/ and priors/, or a project with such artifacts, got {state}.",
        where=folder.absolute(),
        fix="Name a project in which vqvae2 run has finished, or its folder artifacts.",
        code=4,
    )


def load_parts(folder: Path) -> TrainedModels:
    """Load the VQ-VAE of a model folder, and its priors if there are any.

    Raises UserError if a part is damaged or does not match the others, or if the VQ-VAE does not quantize.
    """
    if (folder / "priors").is_dir():
        models = TrainedModels.load(folder / "vqvae", folder / "priors")
    else:
        vqvae, artifact = model_file.load_vqvae(folder / "vqvae")
        models = TrainedModels(vqvae, {}, {**artifact.meta, "label_counts": []}, {"vqvae": artifact.digest})
    if models.vqvae.config.quantizer.mode == "none":
        raise UserError(
            "This VQ-VAE does not quantize, so its images have no codes.",
            where=folder / "vqvae",
            fix="Train a VQ-VAE with vqvae.quantizer.mode ema or loss.",
            code=2,
        )
    return models


def sampling_rule(folder: Path) -> SampleConfig:
    """Return the sampling rule of the samples in a model folder, or of an exported model.

    The defaults if the folder has neither samples nor a `config.json`. Raises UserError if `config.json` is not valid.
    """
    try:
        meta = open_samples(folder / "samples").artifact.meta
        return SampleConfig.of_rule(meta)
    except (UserError, OSError):
        pass
    path = folder / CONFIG
    if not path.is_file():
        return SampleConfig()
    try:
        config = json.loads(path.read_bytes())
        if config["format"] != CONFIG_FORMAT:
            raise ValueError(f"format must be {CONFIG_FORMAT}, got {config['format']!r}")
        rule = config["sampling"]
        if unknown := rule.keys() - {*RULE_SETTINGS}:
            raise ValueError(f"sampling must have any of {', '.join(RULE_SETTINGS)}, got {min(unknown)}")
        return SampleConfig.of_rule(rule)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"The settings of this exported model are not valid: {error}.",
            where=path,
            fix="Export or download the model again.",
            code=5,
        ) from error
