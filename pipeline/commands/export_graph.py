"""`vqvae2 export encoder` and `vqvae2 export decoder`: half of the VQ-VAE as a graph for other programs."""

from pathlib import Path

from pipeline.image_commands import MODEL, require_model
from stages.errors import UserError
from stages.inference.folder import load_parts
from stages.inference.graphs import check_format, write_graph


def run(part: str, out: Path, *, model: Path | None) -> int:
    """Write the encoder or the decoder to a new file, and print its inputs and outputs; return the exit status.

    Raises UserError if the model is missing or damaged, or the file exists or cannot be written.
    """
    check_format(out)
    if out.exists():
        raise UserError(f"{out.name} exists.", where=out, fix="Choose another name, or delete the file.", code=2)
    require_model(model or MODEL, "vqvae")
    models = load_parts(model or MODEL)
    size = models.image_size
    write_graph(models.vqvae, part, out, image_size=size)
    grids = ", ".join(f"{name} int64 (N, {side}, {side})" for name, side in models.vqvae.config.grids(size).items())
    images = f"images float32 (N, 3, {size}, {size}) in [-1, 1]"
    print(f"{images} -> {grids}" if part == "encoder" else f"{grids} -> {images}")
    print(out)
    return 0
