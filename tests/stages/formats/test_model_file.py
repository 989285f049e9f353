"""Tests of model folders: round trip, and invalid or malicious files."""

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models.config import LevelConfig, QuantizerConfig, VQVAEConfig
from models.vqvae import VQVAE
from stages.errors import UserError
from stages.formats import artifact, model_file

CONFIG = VQVAEConfig({"top": LevelConfig(4, channels=8, residual_channels=8, residual_blocks=1, entries=8, dim=4)})


def make(folder: Path, change: Callable[[dict[str, Any]], object] = lambda network: None) -> Path:
    """Write a model with changed settings, and a manifest of matching hashes."""
    network = model_file.network_meta(CONFIG)
    change(network)
    model_file.write(folder, "vqvae", VQVAE(CONFIG).state_dict(), {"network": network}, history=[], images={})
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        model_file.load_vqvae(folder)
    assert caught.value.code == 5 and caught.value.fix
    return str(caught.value)


def test_settings_at_their_neutral_value_are_left_out():
    """Manifests are those of releases without these settings; other values are recorded and read back."""
    assert "initial" not in model_file.network_meta(CONFIG)["quantizer"]
    changed = VQVAEConfig(CONFIG.levels, QuantizerConfig(initial="random"), image_variance=0.5)
    meta = model_file.network_meta(changed)
    assert (meta["quantizer"]["initial"], meta["image_variance"]) == ("random", 0.5)


def test_a_written_model_is_read_back(tmp_path: Path):
    """The network is rebuilt from its settings and weights alone."""
    network, _ = model_file.load_vqvae(make(tmp_path / "vqvae"))
    assert network.config == CONFIG


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda network: network.update(_target_="os.system"), "_target_"),
        (lambda network: network["levels"]["top"].update(_target_="os.system"), "levels.top._target_"),
        (lambda network: network["levels"]["top"].update(stride=5), "levels.top"),
        (lambda network: network.update(levels=[]), "levels"),
    ],
)
def test_invalid_network_settings_are_rejected_by_name(tmp_path: Path, change, key: str):
    """No name in a file is imported or called."""
    assert f"The network's setting {key} is not valid in this version" in refusal(make(tmp_path / "vqvae", change))


class _MakeFolder:
    """Object whose unpickling makes a folder, as proof that code ran."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def _saved(value: object) -> bytes:
    torch.save(value, buffer := io.BytesIO())
    return buffer.getvalue()


@pytest.mark.parametrize("dump", [pickle.dumps, _saved, lambda _: b"<html>404</html>", lambda _: b""])
def test_weights_that_are_not_safetensors_are_rejected(tmp_path: Path, dump: Callable[[object], bytes]):
    """A pickle, a web page or an empty file with a valid hash is not loaded, and no pickle is run."""
    with artifact.commit_folder(tmp_path / "vqvae", "vqvae", {"network": model_file.network_meta(CONFIG)}) as folder:
        (folder / model_file.WEIGHTS).write_bytes(dump(_MakeFolder(tmp_path / "ran")))
    assert model_file.WEIGHTS in refusal(tmp_path / "vqvae")
    assert not (tmp_path / "ran").exists()
