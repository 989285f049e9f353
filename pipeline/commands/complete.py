"""`vqvae2 complete`: several images that share the upper part of an image file, drawn from the trained priors."""

from pathlib import Path

from pipeline.image_commands import MODEL, repeat_class, replace_folder, require_model, require_replaceable
from stages.images.contact_sheet import contact_sheet, encode_png
from stages.inference.model import Model

KIND = "completed images"
SHEET = "sheet.png"


def run(image: Path, out: Path, *, rows: float, count: int, seed: int, model: Path | None, class_name: str) -> int:
    """Complete an image, print the folder; return the exit status."""
    complete(image, out, rows=rows, count=count, seed=seed, model=model or MODEL, class_name=class_name)
    print(out)
    return 0


def complete(
    image: Path,
    out: Path,
    *,
    rows: float = 0.5,
    count: int = 4,
    seed: int = 0,
    model: Path = MODEL,
    class_name: str = "",
) -> None:
    """Keep the upper `rows`, a fraction, of the codes of an image, and draw the others `count` times.

    Writes one PNG file per drawn image, and sheet.png: the image, its reconstruction, and the drawn images. Without a
    class, the image gets its most probable one. Earlier images in `out` are replaced. Raises UserError if `out` holds
    anything else, the model is missing, the class is unknown, or the image cannot be read.
    """
    require_replaceable(out, KIND)
    require_model(model, "vqvae", "priors")
    trained = Model.open(model)
    labels = repeat_class(class_name, trained.classes, 1)
    pixels = trained.read([image])
    codes = trained.encode(pixels)
    completed = trained.complete_codes(codes, rows=rows, count=count, seed=seed, label=labels[0] if labels else None)
    reconstruction, drawn = (trained.decode(grids, format="numpy") for grids in (codes, completed))
    meta = {"rows": rows, "count": count, "seed": seed, "class": class_name, "models": dict(trained.digests)}
    with replace_folder(out, KIND, meta) as folder:
        for number, drawn_image in enumerate(drawn):
            (folder / f"{number:03d}.png").write_bytes(encode_png(drawn_image))
        shown = [pixels[0], reconstruction[0], *drawn]
        (folder / SHEET).write_bytes(contact_sheet(shown, columns=len(shown)))
