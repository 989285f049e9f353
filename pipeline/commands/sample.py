"""`vqvae2 sample`: images drawn from the trained priors."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline import params
from pipeline.image_commands import (
    MODEL,
    earlier_meta,
    replace_folder,
    require_model,
    require_replaceable,
    safe_name,
)
from stages.config import SampleConfig
from stages.errors import UserError
from stages.formats import artifact
from stages.images.contact_sheet import contact_sheet, encode_png
from stages.inference.folder import sampling_rule
from stages.inference.trained_models import TrainedModels, choose_labels
from stages.runtime.device import best_device

KIND = "drawn samples"
MAX_SHEET_IMAGES = 256  # more would be too small to see, and a large draw too long to hold in memory


def run(
    out: Path,
    count: int,
    classes: Sequence[str],
    *,
    seed: int,
    model: Path | None,
    sheet: Path | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
) -> int:
    """Draw images with the options of the command line and print the paths; return the exit status."""
    settings = sampling_rule(model) if model else params.load().sample
    config = choose_config(settings, count, classes, temperature=temperature, top_k=top_k, top_p=top_p)
    sheet = sheet or default_sheet(out)
    draw(out, config, seed=seed, sheet=sheet, model=model or MODEL)
    print(f"{out}\n{sheet}")
    return 0


def default_sheet(out: Path) -> Path:
    """Return the path of the contact sheet beside an output folder."""
    folder = out if out.name not in ("", "..") else out.resolve()
    return folder.with_name(f"{folder.name}.png")


def choose_config(
    settings: SampleConfig,
    count: int,
    classes: Sequence[str],
    *,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
) -> SampleConfig:
    """Combine options of the command line with settings, which stand for options not given.

    Raises UserError if an option is out of range.
    """
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    overrides = {name: value for name, value in options.items() if value is not None}
    try:
        return dataclasses.replace(settings, count=count, classes=tuple(classes), **overrides)  # type: ignore[arg-type]
    except ValueError as error:
        key, headline, fix = params.explain(error)
        raise UserError(headline, where=f"--{key.replace('_', '-')}", fix=fix, code=2) from None


def draw(out: Path, config: SampleConfig, *, seed: int, sheet: Path, model: Path = MODEL) -> None:
    """Draw images, write each as a PNG named by its number and class to `out`, and the first ones on a contact sheet.

    An earlier draw in `out` is replaced. Raises UserError if `out` or `sheet` holds anything else, the models are
    missing, or top_k exceeds their codebooks.
    """
    require_replaceable(out, KIND)
    _require_sheet(sheet, out)
    require_model(model, "vqvae", "priors")
    models = TrainedModels.load(model / "vqvae", model / "priors").to(best_device())
    labels = choose_labels(models, config)
    entries = max(grid.entries for grid in models.grids.values())
    if config.top_k > entries:
        problem = params.top_k_problem("top_k", config.top_k, entries)
        raise UserError(problem.headline, where=model / "vqvae", fix=problem.fix, code=2)
    meta = {
        **{name: getattr(config, name) for name in ("count", "classes", "temperature", "top_k", "top_p")},
        "seed": seed,
        "image_size": models.image_size,
        "models": dict(models.digests),
    }
    shown: list[np.ndarray] = []
    with replace_folder(out, KIND, meta) as folder:
        for start in range(0, config.count, config.batch_size):
            batch_labels = labels[start : start + config.batch_size].tolist()
            _, images = models.draw(range(start, start + len(batch_labels)), batch_labels, config, seed)
            shown.extend(images[: max(0, MAX_SHEET_IMAGES - start)])
            for number, (label, image) in enumerate(zip(batch_labels, images, strict=True), start):
                name = f"{number:06d}-{safe_name(models.classes[label])}" if models.classes else f"{number:06d}"
                (folder / f"{name}.png").write_bytes(encode_png(image))
        with artifact.atomic_write(sheet) as temporary:
            temporary.write_bytes(contact_sheet(shown, columns=math.ceil(math.sqrt(len(shown)))))
        meta["sheet"] = artifact.sha256(sheet)


def _require_sheet(sheet: Path, out: Path) -> None:
    """Raise UserError if the contact sheet is among the images, or would replace a file of other contents."""
    if sheet.resolve().is_relative_to(out.resolve()):
        raise UserError(
            f"The contact sheet must be outside of {out}, whose images are all of one size.",
            where=sheet,
            fix=f"Choose another file, such as --sheet {default_sheet(out)}",
            code=2,
        )
    if sheet.suffix.lower() != ".png" or not sheet.parent.is_dir() or sheet.is_dir():
        raise UserError(
            f"The contact sheet must be a .png file in an existing folder, got {sheet}.",
            where="--sheet",
            fix=f"Choose another file, such as --sheet {default_sheet(out)}",
            code=2,
        )
    if sheet.exists() and artifact.sha256(sheet) != earlier_meta(out, KIND).get("sheet"):
        raise UserError(
            f"{sheet} exists and is not the contact sheet of the samples in {out}.",
            where=sheet.absolute(),
            fix="Choose another file for the contact sheet with --sheet, or move this one.",
            code=2,
        )
