"""Trained model with the interface of huggingface_hub: `from_pretrained`, `save_pretrained` and `push_to_hub`.

A model has several networks, one folder each. So the class uses `ModelHubMixin`, which leaves the layout of files to
it, and writes the folder of `vqvae2 export model`. `PyTorchModelHubMixin` would write the weights of a single network.
"""

import shutil
from pathlib import Path
from typing import Any, Self

import torch

from pipeline import model_folder
from pipeline.model_card import UNKNOWN_LICENSE
from stages.errors import UserError, install_command
from stages.inference.folder import CONFIG, find_model
from stages.inference.model import Model

try:
    from huggingface_hub import ModelHubMixin, snapshot_download
except ImportError:
    raise UserError(
        "HubModel needs the package huggingface_hub.",
        where="vqvae2.HubModel",
        fix=f"Run: {install_command('hub')}. Or load a folder with vqvae2.load.",
        code=3,
    ) from None

DOWNLOAD_RECORDS = ".cache"  # folder that `hf download --local-dir` adds


class HubModel(Model, ModelHubMixin):
    """Trained model, as `vqvae2.load` returns it, with methods to load it from the Hugging Face hub and to publish it.

    `HubModel.from_pretrained` takes an exported folder or the name of a repository. In addition to the options of
    huggingface_hub it takes `device`. `save_pretrained` writes the folder of `vqvae2 export model`, and `push_to_hub`
    publishes it. Raises errors as `vqvae2.load` does, and those of huggingface_hub.
    """

    @classmethod
    def _from_pretrained(  # type: ignore[override]  # names its options, which the base class takes as **kwargs
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        device: torch.device | str | None = None,
    ) -> Self:
        folder = Path(model_id)
        if not folder.is_dir():
            options: dict[str, Any] = {
                "cache_dir": cache_dir,
                "force_download": force_download,
                "local_files_only": local_files_only,
            }
            folder = Path(snapshot_download(model_id, revision=revision, token=token, **options))
        return cls.open(find_model(folder), device=device)

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write the folder of `vqvae2 export model` to a new or empty folder. Raises UserError if it holds files."""
        if not (self.folder / CONFIG).is_file():  # the artifacts of a project
            model_folder.write(self.folder, save_directory, title=save_directory.name, license_id=UNKNOWN_LICENSE)
            return
        model_folder.require_new(save_directory)
        ignored = shutil.ignore_patterns(DOWNLOAD_RECORDS)
        shutil.copytree(self.folder, save_directory, ignore=ignored, dirs_exist_ok=True)
