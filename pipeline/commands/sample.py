"""`vqvae2 sample`: images drawn from the trained priors."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline import params
from pipeline.image_commands import PRIORS, VQVAE, require_folder, safe_name
from stages.config import SampleConfig
from stages.errors import UserError
from stages.images.contact_sheet import contact_sheet, encode_png
from stages.runtime.device import best_device
from stages.sample import TrainedModels, choose_labels


def run(
    out: Path,
    count: int,
    classes: Sequence[str],
    *,
    seed: int,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
) -> int:
    """Draw images with the options of the command line and print the folder; return the exit status."""
    settings = params.load().sample
    draw(out, choose_config(settings, count, classes, temperature=temperature, top_k=top_k, top_p=top_p), seed=seed)
    print(out)
    return 0


def choose_config(
    settings: SampleConfig,
    count: int,
    classes: Sequence[str],
    *,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
) -> SampleConfig:
    """Combine options of the command line with the settings of params.yaml, which stand for options not given.

    Raises UserError if an option is out of range.
    """
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    overrides = {name: value for name, value in options.items() if value is not None}
    try:
        return dataclasses.replace(settings, count=count, classes=tuple(classes), **overrides)  # type: ignore[arg-type]
    except ValueError as error:
        key, headline, fix = params.explain(error)
        raise UserError(headline, where=f"--{key.replace('_', '-')}", fix=fix, code=2) from None


def draw(out: Path, config: SampleConfig, *, seed: int) -> None:
    """Draw images and write each as a PNG named by its number and class, and all of them on one contact sheet.

    Raises UserError if the models are missing or top_k exceeds their codebooks.
    """
    require_folder(out)
    models = TrainedModels.load(VQVAE, PRIORS).to(best_device())
    labels = choose_labels(models, config)
    entries = max(grid.entries for grid in models.grids.values())
    if config.top_k > entries:
        problem = params.top_k_problem("top_k", config.top_k, entries)
        raise UserError(problem.headline, where=VQVAE, fix=problem.fix, code=2)
    out.mkdir(parents=True, exist_ok=True)
    batches = []
    for start in range(0, config.count, config.batch_size):
        batch_labels = labels[start : start + config.batch_size].tolist()
        _, images = models.draw(range(start, start + len(batch_labels)), batch_labels, config, seed)
        batches.append(images)
        for number, (label, image) in enumerate(zip(batch_labels, images, strict=True), start):
            name = f"{number:06d}-{safe_name(models.classes[label])}" if models.classes else f"{number:06d}"
            (out / f"{name}.png").write_bytes(encode_png(image))
    columns = math.ceil(math.sqrt(config.count))
    (out / "sheet.png").write_bytes(contact_sheet(np.concatenate(batches), columns=columns))
