"""`vqvae2 score`: how unlikely the codes of image files are under the trained priors."""

import csv
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
from stages.inference.heat_map import draw_heat_maps
from stages.inference.model import Model

KIND = "scores"
TABLE = "scores.csv"


def run(images: Sequence[Path], out: Path, *, model: Path | None, class_name: str) -> int:
    """Score images, print the numbers of each and the folder; return the exit status."""
    print("\n".join(score(images, out, model=model or MODEL, class_name=class_name)))
    print(out)
    return 0


def score(images: Sequence[Path], out: Path, *, model: Path = MODEL, class_name: str = "") -> list[str]:
    """Score image files; return one line per image.

    Writes a table, and one picture per image: the image, the heat map of each level, and that of all levels. Without a
    class, each image gets its most probable one. Earlier scores in `out` are replaced. Raises UserError if `out` holds
    anything else, the model is missing, the class is unknown, or an image cannot be read.
    """
    require_replaceable(out, KIND)
    require_model(model, "vqvae", "priors")
    trained = Model.open(model)
    labels = repeat_class(class_name, trained.classes, len(images))
    pixels = trained.read(list(images))
    scores = trained.score(pixels, labels=labels)
    heat_maps = draw_heat_maps(scores, trained.levels)
    classes = [trained.classes[label] if label >= 0 else "" for label in scores.labels]
    lines, rows = [], []
    with replace_folder(out, KIND, {"models": dict(trained.digests)}) as folder:
        for number, (path, nats) in enumerate(zip(images, scores.per_image, strict=True)):
            row = [pixels[number], *(pictures[number] for pictures in heat_maps.values())]
            picture = folder / f"{number:03d}-{safe_name(path.stem)}.png"
            picture.write_bytes(contact_sheet(row, columns=len(row)))
            per_code = {level: values[number] for level, values in scores.per_level.items()}
            rows.append([path, classes[number], f"{nats:.3f}", *(f"{value:.4f}" for value in per_code.values())])
            texts = [f"{nats:.1f} nats", *(f"{level} {value:.2f} per code" for level, value in per_code.items())]
            lines.append(f"{path}: {', '.join([*texts, *filter(None, [classes[number]])])}")
        header = ["image", "class", "nats", *(f"{level}_nats_per_code" for level in trained.levels)]
        with (folder / TABLE).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *rows])
    return lines
