"""Tests of the stage `codes`."""

from pathlib import Path

import pytest

from models.config import QuantizerConfig, VQVAEConfig
from models.vqvae import VQVAE
from stages import codes
from stages.config import CodesConfig
from stages.errors import UserError
from stages.formats import model_file


def test_vqvae_without_codes_is_refused(project, tmp_path: Path):
    """A VQ-VAE that does not quantize has no codes to write."""
    _, artifact = model_file.load_vqvae(project.path("vqvae"))
    config = VQVAEConfig(project.network.levels, QuantizerConfig(mode="none"))
    meta = {**artifact.meta, "network": model_file.network_meta(config)}
    model_file.write(tmp_path / "vqvae", "vqvae", VQVAE(config).state_dict(), meta, history=[], images={})
    with pytest.raises(UserError, match=r"does not quantize, so it has no codes\.") as caught:
        codes.run(
            project.path("shards"), tmp_path / "vqvae", tmp_path / "codes",
            codes=CodesConfig(), augment=project.augment, seed=0, context=project.run("codes", "none"),
        )  # fmt: skip
    assert caught.value.where == "params.yaml: vqvae.quantizer.mode" and "ema or loss" in caught.value.fix
