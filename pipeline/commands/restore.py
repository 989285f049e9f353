"""`vqvae2 restore`: image files decoded after their unlikely codes are drawn again from the trained priors."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.image_commands import (
    MODEL,
    repeat_class,
    replace_folder,
    require_model,
    require_replaceable,
    safe_name,
)
from stages.images.contact_sheet import contact_sheet
from stages.inference.model import Model

KIND = "restored images"


def run(
    images: Sequence[Path],
    out: Path,
    *,
    threshold: float | None,
    seed: int,
    model: Path | None,
    class_name: str,
) -> int:
    """Restore images, print the number of changed codes of each and the folder; return the exit status."""
    print("\n".join(restore(images, out, threshold=threshold, seed=seed, model=model or MODEL, class_name=class_name)))
    print(out)
    return 0


def restore(
    images: Sequence[Path],
    out: Path,
    *,
    threshold: float | None = None,
    seed: int = 0,
    model: Path = MODEL,
    class_name: str = "",
) -> list[str]:
    """Restore image files; return one line per image with the number of its changed codes per level.

    Writes one picture per image: the image, its reconstruction, and the restored image. Without a class, each image
    gets its most probable one. Earlier pictures in `out` are replaced. Raises UserError if `out` holds anything else,
    the model is missing, the class is unknown, or an image cannot be read.
    """
    require_replaceable(out, KIND)
    require_model(model, "vqvae", "priors")
    trained = Model.open(model)
    labels = repeat_class(class_name, trained.classes, len(images))
    pixels = trained.read(list(images))
    codes = trained.encode(pixels)
    restored_codes = trained.restore_codes(codes, threshold=threshold, seed=seed, labels=labels)
    rows = (pixels, *(trained.decode(grids, format="numpy") for grids in (codes, restored_codes)))
    changed = {level: (codes[level] != restored_codes[level]).sum((1, 2)) for level in trained.levels}
    lines = []
    meta = {"threshold": threshold, "seed": seed, "class": class_name, "models": dict(trained.digests)}
    with replace_folder(out, KIND, meta) as folder:
        for number, (path, row) in enumerate(zip(images, zip(*rows, strict=True), strict=True)):
            picture = folder / f"{number:03d}-{safe_name(path.stem)}.png"
            picture.write_bytes(contact_sheet(row, columns=len(row)))
            counts = (f"{changed[level][number]} of {codes[level][number].size} {level}" for level in trained.levels)
            lines.append(f"{path}: {' and '.join(counts)} codes changed")
    return lines
