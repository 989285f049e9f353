"""What a person does with trained models by hand, outside of the pipeline: draw images, reconstruct their own."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import torch

from stages.config import DatasetConfig, SampleConfig
from stages.errors import UserError
from stages.formats import model_file
from stages.images.contact_sheet import contact_sheet, png, to_uint8
from stages.images.decode import RejectedImage, decode
from stages.images.sources import LARGEST_FILE
from stages.images.tensors import to_float
from stages.sample import Models, choose_labels

VQVAE = Path("artifacts/vqvae")
PRIORS = Path("artifacts/priors")


def sample(out: Path, config: SampleConfig, *, seed: int) -> None:
    """Draw images into a folder, each as a PNG named by its number and class, and all on one sheet."""
    _require_folder(out)
    models = Models.load(VQVAE, PRIORS).to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    labels = choose_labels(models, config)
    entries = max(grid.entries for grid in models.grids.values())
    if config.top_k > entries:
        raise UserError(
            f"top_k is {config.top_k}, but no level of these models has more than {entries} entries.",
            where=VQVAE,
            fix=f"Use 1 to {entries}, or 0 to keep all.",
            code=2,
        )
    out.mkdir(parents=True, exist_ok=True)
    images = []
    for start in range(0, config.count, config.batch_size):
        chosen = labels[start : start + config.batch_size].tolist()
        _, drawn = models.draw(range(start, start + len(chosen)), chosen, config, seed)
        images.append(drawn)
        for number, (label, image) in enumerate(zip(chosen, drawn, strict=True), start):
            name = f"{number:06d}-{_safe(models.classes[label])}" if models.classes else f"{number:06d}"
            (out / f"{name}.png").write_bytes(png(image))
    (out / "sheet.png").write_bytes(contact_sheet(np.concatenate(images), columns=math.ceil(math.sqrt(config.count))))


def reconstruct(images: list[Path], out: Path) -> list[str]:
    """Reconstruct image files from each prefix of levels; return a line per image with the error of each.

    Writes, for each image, itself and its reconstructions side by side. Images are cut and resized as the training
    images were.
    """
    _require_folder(out)
    network, found = model_file.load_vqvae(VQVAE)
    if network.config.quantizer.mode == "none":
        raise UserError(
            "This VQ-VAE does not quantize, so it has no codes to reconstruct images from.",
            where=VQVAE,
            fix="Train one with vqvae.quantizer.mode ema or loss.",
            code=2,
        )
    config = dataclasses.replace(DatasetConfig("by hand", ".", found.meta["image_size"]), **found.meta["images"])
    levels = list(network.config.levels)
    pixels = [_read(path, config) for path in images]
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (path, image) in enumerate(zip(images, pixels, strict=True)):
        batch = to_float(torch.from_numpy(image[None]), torch.device("cpu"))
        with torch.inference_mode():
            codes = network.encode(batch)
            prefixes = [{name: codes[name] for name in levels[:count]} for count in range(1, len(levels) + 1)]
            decoded = [network.decode(prefix) for prefix in prefixes]
        shown = np.concatenate([image[None], *(to_uint8(each.numpy()) for each in decoded)])
        (out / f"{number:03d}-{_safe(path.stem)}.png").write_bytes(contact_sheet(shown, columns=len(shown)))
        # Pixels lie in [-1, 1]: their range is 2.
        errors = [10 * math.log10(4 / max((each - batch).square().mean().item(), 1e-12)) for each in decoded]
        named = ", ".join(f"{'+'.join(levels[: n + 1])} {error:.1f} dB" for n, error in enumerate(errors))
        lines.append(f"{path}: {named}")
    return lines


def _require_folder(out: Path) -> None:
    """Refuse a file, before any work is done for what cannot be put there."""
    if out.exists() and not out.is_dir():
        raise UserError("This is a file; images need a folder.", where=out, fix="Give another name.", code=2)


def _read(path: Path, config: DatasetConfig) -> np.ndarray:
    fix = "Give another file: docs/data.md says what is read."
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise RejectedImage(f"longer than {LARGEST_FILE >> 20} MiB")
        return np.array(decode(path.read_bytes(), config).pixels)
    except OSError as error:
        reason, fix = error.strerror or str(error), "Give the path of an image file that can be read."
    except RejectedImage as error:
        reason = str(error)
    raise UserError(f"The image cannot be used: {reason}.", where=path, fix=fix, code=4)


def _safe(name: str) -> str:
    """Keep what is safe in a file's name anywhere."""
    return "".join(character if character.isalnum() or character in "-_" else "_" for character in name)[:80]
