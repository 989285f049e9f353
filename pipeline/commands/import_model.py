"""`vqvae2 import`: a model that another project has trained, as a model folder."""

from pathlib import Path

from pipeline import dvc_yaml, frozen_stage
from pipeline.image_commands import MODEL
from pipeline.model_folder import require_new
from pipeline.text import first_few
from stages.config import DatasetConfig
from stages.errors import UserError
from stages.formats import artifact, model_file, rosinality

FORMATS = ("rosinality",)


def run(format_name: str, checkpoint: Path, out: Path, *, image_size: int) -> int:
    """Import a checkpoint as `out`/vqvae and print the settings of the network; return the exit status.

    If `out` is the folder artifacts of a project, the stage that trains the VQ-VAE is frozen there.

    Raises UserError for an unknown format, a checkpoint that cannot be imported, an image size that does not fit the
    network, or if `out`/vqvae holds files.
    """
    if format_name not in FORMATS:
        raise UserError(
            f"The format must be {first_few(FORMATS)}, got {format_name}.",
            where="vqvae2 import",
            fix="Run: vqvae2 import rosinality CHECKPOINT.pt --out DIR",
            code=2,
        )
    folder = out / "vqvae"
    require_new(folder)
    is_project = out.resolve() == MODEL.resolve() and dvc_yaml.FILE.is_file()
    if is_project:
        frozen_stage.require_freezable()
    network = rosinality.read(checkpoint)
    try:
        grids = network.config.grids(image_size)
    except ValueError as error:
        raise UserError(
            f"{error}.", where="--image-size", fix="Choose for example --image-size 256.", code=2
        ) from error
    defaults = DatasetConfig("imported", ".", image_size)
    meta = {
        "network": model_file.network_meta(network.config),
        "image_size": image_size,
        "grids": grids,
        "classes": [],
        "shards": "",  # the training images are not known
        "images": {name: getattr(defaults, name) for name in ("resize_mode", "background", "max_pixels")},
        "imported_from": rosinality.describe(checkpoint, artifact.sha256(checkpoint)),
    }
    if folder.is_dir():
        folder.rmdir()  # empty
    model_file.write(folder.absolute(), "vqvae", network.state_dict(), meta, history=[], images={})
    for name, level in network.config.levels.items():
        side = grids[name]
        print(
            f"{name}: {side} x {side} codes of {level.entries} entries with {level.dim} dimensions, "
            f"{level.channels} channels, {level.residual_blocks} residual blocks of {level.residual_channels}"
        )
    if is_project:
        frozen_stage.freeze()
        print(f"The stage vqvae is frozen in {dvc_yaml.FILE}: vqvae2 run trains priors on the codes of this VQ-VAE.")
        print(f"It needs the same image size: -S dataset.image_size={image_size}")
    print(f"Use it: vqvae2 reconstruct IMAGE --model {out}. Train priors on its codes: docs/models.md")
    print(out)
    return 0
