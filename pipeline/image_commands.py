"""Paths that `vqvae2 sample` and `vqvae2 reconstruct` share: the trained models, and the images they write."""

from pathlib import Path

from stages.errors import UserError

VQVAE = Path("artifacts/vqvae")
PRIORS = Path("artifacts/priors")
MAX_NAME_LENGTH = 80  # characters; file systems allow 255 bytes


def require_folder(out: Path) -> None:
    """Raise UserError if the output folder is a file, before anything is computed."""
    if out.exists() and not out.is_dir():
        raise UserError(
            f"{out} must be a folder for images, got a file.", where=out, fix="Choose another name.", code=2
        )


def safe_name(name: str) -> str:
    """Replace characters that some file systems do not allow, and cut the name to 80 characters."""
    characters = (character if character.isalnum() or character in "-_" else "_" for character in name)
    return "".join(characters)[:MAX_NAME_LENGTH]
