"""Stage `vqvae` of a project with an imported VQ-VAE: frozen in dvc.yaml, so that DVC keeps the model and trains none.

DVC records the outputs of a frozen stage as they are, and runs later stages on them. It requires every output, so the
curves of the training, which are not known, are written as files without rows.
"""

import re
from pathlib import Path

from pipeline import dvc_yaml, params
from stages.errors import UserError
from stages.formats import curves

STAGE = "vqvae"
FROZEN_LINE = "    frozen: true  # artifacts/vqvae was imported; delete this line to train a VQ-VAE\n"


def require_freezable(file: Path = dvc_yaml.FILE) -> None:
    """Raise UserError if the stage in dvc.yaml is not found where `freeze` adds a line."""
    _frozen_text(file)


def freeze(file: Path = dvc_yaml.FILE) -> None:
    """Freeze the stage in dvc.yaml, and write its outputs that an imported VQ-VAE does not have."""
    file.write_text(_frozen_text(file), encoding="utf-8")
    stage = dvc_yaml.stages(params.read(), file)[STAGE]
    for name in stage.plots:
        curves.write_plot(Path(name), ["step", "series"], [])
    for name in stage.metrics:
        curves.write_metrics(Path(name), {})


def _frozen_text(file: Path) -> str:
    """Return the contents of dvc.yaml with the stage frozen; other lines stay as they are."""
    text = file.read_text(encoding="utf-8")
    if re.search(rf"^  {STAGE}:\n(?:    .*\n)*?    frozen: true", text, re.MULTILINE):
        return text
    frozen, count = re.subn(rf"^  {STAGE}:\n", lambda match: match[0] + FROZEN_LINE, text, flags=re.MULTILINE)
    if count != 1:
        raise UserError(
            f"{file} must have one stage {STAGE}, got {count}.",
            where=file.absolute(),
            fix="Import into another folder with --out, or restore the file.",
            code=2,
        )
    return frozen
