"""Model folders, output folders and classes of the commands that read or draw images.

A model folder holds `vqvae/` and `priors/`, as the folder `artifacts` of a project does. An output folder holds the
images of one call and a manifest; a later call replaces it only if it holds nothing else.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.checks.inputs import require_outside_project_source
from pipeline.text import first_few
from stages.errors import UserError, unknown_class
from stages.formats import artifact

MODEL = Path("artifacts")
PARTS = {"vqvae": "VQ-VAE", "priors": "prior"}  # folders of a model
MAX_NAME_LENGTH = 80  # characters; file systems allow 255 bytes


def require_model(model: Path, *names: str) -> None:
    """Raise UserError if a model folder, of this project or given as --model, does not hold the named parts."""
    missing = [name for name in names if not (model / name).is_dir()]
    if not missing:
        return
    if model == MODEL:
        raise UserError(
            f"{MODEL / missing[0]} does not exist: there is no trained {PARTS[missing[0]]}.",
            where=MODEL.absolute(),
            fix=f"Run: vqvae2 run --stage {'sample' if 'priors' in names else 'vqvae'}",
            code=4,
        )
    inner = model / MODEL
    raise UserError(
        f"A model folder must hold {' and '.join(f'{name}/' for name in names)}, got {model}.",
        where=model.absolute(),
        fix=f"Did you mean --model {inner}?"
        if inner.is_dir()
        else "Use the folder artifacts/ of a project with a finished run: --model PROJECT/artifacts",
        code=2,
    )


def require_replaceable(out: Path, kind: str) -> None:
    """Raise UserError if an output folder holds more than the images of an earlier call, or is a file.

    The same if it is inside of the source of images of the present project.
    """
    require_outside_project_source(out)
    if out.exists() and not out.is_dir():
        raise UserError(
            f"{out} must be a folder for images, got a file.", where=out, fix="Choose another name.", code=2
        )
    if out.is_dir() and (foreign := _foreign_files(out, kind)):
        raise UserError(
            f"{out} must be a new or empty folder, or hold only earlier {kind}; it also holds {first_few(foreign)}.",
            where=out.absolute(),
            fix="Choose another folder, or move these files.",
            code=2,
        )


@contextmanager
def replace_folder(out: Path, kind: str, meta: dict[str, Any]) -> Iterator[Path]:
    """Yield an empty folder to write images to; commit it as `out`, with a manifest, when the block succeeds.

    Raises UserError as `require_replaceable`.
    """
    require_replaceable(out, kind)
    with artifact.commit_folder(out.resolve(), kind, meta) as folder:
        yield folder


def earlier_meta(out: Path, kind: str) -> dict[str, Any]:
    """Return the metadata of an earlier call's images in a folder; empty if there are none."""
    try:
        return dict(artifact.read(out, kind).meta)
    except (UserError, OSError):
        return {}


def _foreign_files(out: Path, kind: str) -> list[str]:
    """List the files and empty folders of an output folder that an earlier call has not written, or not like this."""
    names = {
        path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir() or not any(path.iterdir())
    }
    try:
        images_artifact = artifact.read(out, kind)
        images_artifact.verify()
    except (UserError, OSError):
        return sorted(names)
    return sorted(names - images_artifact.files.keys() - {artifact.MANIFEST})


def repeat_class(name: str, classes: Sequence[str], count: int) -> list[str] | None:
    """Return the labels of `count` images of one class; None without a name. Raises UserError for an unknown class."""
    if not name:
        return None
    if name not in classes:
        raise unknown_class(name, classes, where="--class")
    return [name] * count


def safe_name(name: str) -> str:
    """Replace characters that some file systems do not allow, and cut the name to 80 characters."""
    characters = (character if character.isalnum() or character in "-_" else "_" for character in name)
    return "".join(characters)[:MAX_NAME_LENGTH]
