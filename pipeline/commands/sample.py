"""`vqvae2 sample`: images drawn from the trained priors."""

import dataclasses
import math
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import conflicts, params
from pipeline.image_commands import (
    MODEL,
    earlier_meta,
    replace_folder,
    require_model,
    require_replaceable,
    safe_name,
)
from stages.config import SAMPLING_RULE, SampleConfig
from stages.errors import UserError
from stages.formats import artifact
from stages.images.contact_sheet import contact_sheet, encode_png
from stages.inference.folder import sampling_rule
from stages.inference.sampling_options import merge_options
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
    guidance: float | None,
    level_rules: Sequence[str],
) -> int:
    """Draw images with the options of the command line and print the paths; return the exit status."""
    settings = sampling_rule(model) if model else params.load().sample
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance": guidance}
    config = choose_config(settings, count, classes, level_rules, **options)
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
    level_rules: Sequence[str] = (),
    **options: float | None,
) -> SampleConfig:
    """Combine options of the command line with settings, which stand for options not given.

    `level_rules` are options of single levels, such as "bottom.temperature=0.8"; they override those of all levels,
    and an option of all levels overrides settings of single levels. Raises UserError if an option is out of range.
    """
    rules: dict[str, dict[str, Any]] = {}
    for text in level_rules:
        level, name, value = _parse_level_rule(text)
        rules.setdefault(level, {})[name] = value
    try:
        # Without an option of a level, None keeps the settings of single levels; an empty mapping would remove them.
        config = merge_options({**options, "level_rules": rules or None}, settings)
        return dataclasses.replace(config, count=count, classes=tuple(classes))
    except ValueError as error:
        key, headline, fix = conflicts.explain(error)
        raise UserError(headline, where=f"--{key.replace('_', '-')}", fix=fix, code=2) from None


def _parse_level_rule(text: str) -> tuple[str, str, float]:
    """Parse an option of one level, such as bottom.temperature=0.8. Raises UserError if it has another form."""
    match = re.fullmatch(r"(\w+)\.(\w+)=([0-9.eE+-]+)", text)
    number = None
    if match and match[2] in SAMPLING_RULE:
        with suppress(ValueError):
            number = int(match[3]) if match[2] == "top_k" else float(match[3])
    if match is None or number is None:
        raise UserError(
            f"{text!r} is not an option of one level.",
            where="--level",
            fix=f"Write LEVEL.OPTION=NUMBER, with any of {', '.join(SAMPLING_RULE)}: --level bottom.temperature=0.8",
            code=2,
        )
    return match[1], match[2], number


def draw(out: Path, config: SampleConfig, *, seed: int, sheet: Path, model: Path = MODEL) -> None:
    """Draw images, write each as a PNG named by its number and class to `out`, and the first ones on a contact sheet.

    An earlier draw in `out` is replaced. Raises UserError if `out` or `sheet` holds anything else, the models are
    missing, or a top_k exceeds its codebook.
    """
    require_replaceable(out, KIND)
    _require_sheet(sheet, out)
    require_model(model, "vqvae", "priors")
    models = TrainedModels.load(model / "vqvae", model / "priors").to(best_device())
    models.require_drawable(config, where="options" if model == MODEL else str(model))
    labels = choose_labels(models, config)
    entries = {level: grid.entries for level, grid in models.grids.items()}
    for problem in conflicts.top_k_problems(config, entries):
        raise UserError(problem.headline, where=model / "vqvae", fix=problem.fix, code=2)
    meta = {
        "count": config.count,
        "classes": config.classes,
        **config.describe_rule(),
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
