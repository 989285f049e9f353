"""Numbers of a finished ablation experiment: its metrics, costs, and the sharpness of its reconstructions.

The metrics come from the experiment's commit. The sharpness is measured here, from the VQ-VAE and the shards in DVC's
cache. The time is that of `vqvae2 ablate` on this machine.

B images, 3 channels, H rows, W columns.
"""

import json
import math
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline import dvc, dvc_yaml, finished_results, params
from pipeline.ablations import Experiment
from pipeline.commands import plan
from stages.config import EvaluateConfig, Params
from stages.formats import model_file
from stages.formats.artifact import atomic_write
from stages.formats.shards import open_shards
from stages.images.tensors import to_float
from stages.metrics.distortion import PIXEL_RANGE
from stages.tracking.tags import git

FOLDER = Path("runs/ablations")


@dataclass(frozen=True)
class Result:
    """Numbers of one experiment. NaN stands for a number that it does not have."""

    parameters: int  # of all networks
    training_flops: int  # of all trainings
    nll: Mapping[str, float]  # level -> nats per code, of validation images if there are any
    bits_per_pixel: float  # of the codes, under the priors
    mse: float  # of pixels in [-1, 1]
    sharpness: float  # gradient energy of the reconstructions, divided by that of their images
    kid: float  # of the samples
    seconds: float
    frechet: float = math.nan  # of the samples, and so are the next two
    precision: float = math.nan
    recall: float = math.nan

    def number(self, name: str) -> float:
        """Return a number by its name in `Ablation.y`."""
        level = name.removeprefix("nll_")
        return self.nll.get(level, math.nan) if level != name else float(getattr(self, name))


def read(experiment: Experiment, commit: str) -> Result:
    """Read the numbers of an experiment from its commit; measure the sharpness if this machine has not yet."""
    settings = experiment.settings
    metrics = {
        Path(path).stem: json.loads(git("show", f"{commit}:./{path}") or "{}")
        for stage in experiment.stages.values()
        for path in stage.metrics
    }
    priors = [stage.key for stage in experiment.stages.values() if stage.module == "prior"]
    nll = {level: metrics[f"prior_{level}"]["nll"] for level in priors}
    evaluated = metrics.get("evaluate", {})
    listing = plan.read_listing(settings.dataset)
    classes = len(listing.classes) if listing is not None and settings.dataset.labels != "none" else 0
    trained = [
        cost
        for cost in plan.count(settings, classes)
        if any(cost.stage == stage.cli_name for stage in experiment.stages.values())
    ]
    measurements = read_measurements(experiment.name)
    sharpness = measurements.get("sharpness", math.nan)
    if math.isnan(sharpness):
        sharpness = _sharpness(commit, settings)
        write_measurements(experiment.name, measurements | {"sharpness": sharpness})
    return Result(
        parameters=sum(cost.parameters for cost in trained),
        training_flops=sum(cost.training_flops for cost in trained),
        nll=nll,
        bits_per_pixel=_bits_per_pixel(settings, nll),
        mse=reconstruction_mse(metrics),
        sharpness=sharpness,
        kid=next((value for name, value in evaluated.items() if name.startswith("kid")), math.nan),
        seconds=measurements.get("seconds", math.nan),
        **{name: evaluated.get(name, math.nan) for name in ("frechet", "precision", "recall")},
    )


def read_measurements(name: str) -> dict[str, float]:
    """Read what this machine has measured of an experiment; empty if there is no file."""
    with suppress(OSError, ValueError):
        return dict(json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")))
    return {}


def write_measurements(name: str, measurements: Mapping[str, float]) -> None:
    """Write what this machine has measured of an experiment. NaN is left out, so that it is measured again."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with atomic_write(FOLDER / f"{name}.json") as temporary:
        temporary.write_text(
            json.dumps({key: value for key, value in measurements.items() if math.isfinite(value)}) + "\n",
            encoding="utf-8",
        )


def reconstruction_mse(metrics: Mapping[str, Mapping[str, float]]) -> float:
    """Return the MSE of pixels in [-1, 1] by the metrics of the stages; NaN if there is none.

    The value at the end of the training is preferred, because a variant that ends with the stage `vqvae` has no other,
    and `evaluate` measures other images. An imported VQ-VAE has no training; all variants then have that of `evaluate`.
    """
    psnr = next(
        (metrics[stage]["psnr"] for stage in ("vqvae", "evaluate") if "psnr" in metrics.get(stage, {})), math.nan
    )
    return PIXEL_RANGE**2 / 10 ** (psnr / 10)


def _bits_per_pixel(settings: Params, nll: Mapping[str, float]) -> float:
    """Compute the rate of all levels' codes under their priors; NaN if a level has no prior."""
    size = settings.dataset.image_size
    grids = settings.vqvae.grids(size)
    return sum(side**2 * nll.get(level, math.nan) for level, side in grids.items()) / math.log(2) / size**2


def _sharpness(commit: str, settings: Params) -> float:
    """Measure the sharpness of an experiment's reconstructions; NaN if DVC's cache lacks the VQ-VAE or the shards."""
    lock: Mapping[str, Any] = params.parse(git("show", f"{commit}:./{dvc_yaml.LOCK}") or "{}").get("stages", {})
    md5s = {entry["path"]: entry.get("md5", "") for stage in lock.values() for entry in stage.get("outs", [])}
    with tempfile.TemporaryDirectory() as temporary, suppress(*finished_results.READ_ERRORS):
        outs = {out: md5s[out] for out in ("artifacts/shards", "artifacts/vqvae")}
        if (cache := dvc.cache_folder()) is None:
            return math.nan
        shards, vqvae = (_link(cache, md5, Path(temporary, out)) for out, md5 in outs.items())
        return reconstruction_sharpness(shards, vqvae, settings.evaluate)
    return math.nan


def _link(cache: Path, md5: str, folder: Path) -> Path:
    """Link the files of a folder in DVC's cache."""
    for name, file_md5 in finished_results.read_listing(cache, md5).items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(finished_results.cache_path(cache.absolute(), file_md5))
    return folder


@torch.inference_mode()
def reconstruction_sharpness(shards: Path, vqvae: Path, config: EvaluateConfig) -> float:
    """Divide the gradient energy of reconstructions by that of their images, the first `max_images`.

    The images are those of the validation split, or of the training split if there are none. Below 1: the
    reconstructions are blurred.
    """
    network, _ = model_file.load_vqvae(vqvae)
    images = open_shards(shards)
    split = images.split("validation") if len(images.split("validation")) else images.split("train")
    energies = np.zeros(2)
    count, batch_size = min(len(split), config.max_images), config.batch_size
    for start in range(0, count, batch_size):
        pixels = np.stack([split.read(index) for index in range(start, min(start + batch_size, count))])
        batch = to_float(torch.from_numpy(pixels), torch.device("cpu"))
        reconstruction = network(batch).reconstruction.clamp(-1, 1)
        energies += gradient_energy(reconstruction), gradient_energy(batch)
    return float(energies[0] / energies[1]) if energies[1] else math.nan


def gradient_energy(images: Tensor) -> float:
    """Return the sum of squared differences of neighbouring pixels, along rows and columns, of (B, 3, H, W)."""
    rows, columns = images.diff(dim=2), images.diff(dim=3)
    return float(rows.square().sum(dtype=torch.float64) + columns.square().sum(dtype=torch.float64))
