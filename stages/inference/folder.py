"""Model folder: a VQ-VAE in vqvae/, its priors in priors/, and samples/ whose sampling rule is the default."""

from pathlib import Path

from stages.config import SampleConfig
from stages.errors import UserError
from stages.formats import model_file
from stages.formats.samples import open_samples
from stages.inference.trained_models import TrainedModels


def find_model(folder: Path) -> Path:
    """Return the model folder: `folder` or its subfolder `artifacts`. Raises UserError if neither holds a VQ-VAE."""
    for candidate in (folder, folder / "artifacts"):
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
    """Return the temperature, top-k and top-p of the samples in a model folder; the defaults if it has no samples."""
    try:
        meta = open_samples(folder / "samples").artifact.meta
        return SampleConfig(temperature=meta["temperature"], top_k=meta["top_k"], top_p=meta["top_p"])
    except (UserError, OSError):
        return SampleConfig()
