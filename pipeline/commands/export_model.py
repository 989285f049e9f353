"""`vqvae2 export model`: the trained model as a folder for other machines and for the Hugging Face hub."""

import re
import shlex
from pathlib import Path

from pipeline import model_folder
from pipeline.image_commands import MODEL, require_model
from stages.errors import UserError


def run(out: Path, *, model: Path | None, title: str, license_id: str) -> int:
    """Export a model, print its folder and how to publish it; return the exit status.

    Raises UserError if the model is missing or damaged, if `out` holds files, or for a wrong licence.
    """
    check_license(license_id)
    model_folder.require_new(out)
    require_model(model or MODEL, "vqvae")
    models = model_folder.write(model or MODEL, out, title=title or out.absolute().name, license_id=license_id)
    if not models.priors:
        print("There are no priors: the exported model encodes and decodes only.")
    quoted = shlex.quote(str(out))
    print(f'Load it with: vqvae2.load("{out}"), or --model {quoted}')
    print(f"Read and complete {out / model_folder.CARD} before you publish it: hf upload OWNER/NAME {quoted}")
    print(out)
    return 0


def check_license(license_id: str) -> None:
    """Raise UserError for a licence that is not in the form of the hub's identifiers."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license_id):
        raise UserError(
            f"--license must be an identifier of small letters, digits, dots and hyphens, got {license_id!r}.",
            where="--license",
            fix="Use for example --license mit, apache-2.0, cc-by-nc-4.0 or other.",
            code=2,
        )
