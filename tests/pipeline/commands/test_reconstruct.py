"""Tests of `vqvae2 reconstruct`."""

from contextlib import chdir
from pathlib import Path

import pytest
from PIL import Image

from models.config import QuantizerConfig, VQVAEConfig
from models.vqvae import VQVAE
from pipeline import image_commands
from pipeline.commands import reconstruct
from stages.errors import UserError
from stages.formats import model_file
from stages.formats.shards import open_shards
from stages.images.sources import MAX_FILE_BYTES


def test_image_is_reconstructed_from_each_prefix_of_levels(artifacts, tmp_path: Path):
    """The line has the errors, the picture both reconstructions; a second call replaces only the first one's files."""
    image = open_shards(artifacts.path("shards")).split("validation").read(0)
    Image.fromarray(image).save(tmp_path / "cat.png")
    (line,) = reconstruct.reconstruct([tmp_path / "cat.png"], tmp_path / "out")
    assert "cat.png: top " in line and ", top+bottom " in line and line.endswith(" dB")
    with Image.open(tmp_path / "out" / "000-cat.png") as picture:
        assert picture.width > 2 * picture.height
    (tmp_path / "cat.png").rename(tmp_path / "dog.png")
    reconstruct.reconstruct([tmp_path / "dog.png"], tmp_path / "out", artifacts.path("vqvae").parent)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["000-dog.png", "manifest.json"]
    (tmp_path / "out" / "notes.txt").touch()
    with pytest.raises(UserError, match="earlier reconstructions; it also holds notes"):
        reconstruct.reconstruct([tmp_path / "dog.png"], tmp_path / "out")


def test_path_that_is_no_file_is_refused(artifacts, tmp_path: Path):
    """Of a folder, the fix is the pattern of its images."""
    (tmp_path / "hat").mkdir()
    with pytest.raises(UserError, match=r"hat is a folder\.[\s\S]*fix: Name the images in it, such as .*/hat/\*\.jpg"):
        reconstruct.reconstruct([tmp_path / "hat"], tmp_path / "out")
    with pytest.raises(UserError, match=r"absent\.png does not exist\.[\s\S]*in: .*absent\.png"):
        reconstruct.reconstruct([tmp_path / "absent.png"], tmp_path / "out")


@pytest.mark.parametrize("name", ["text.png", "long.png"])
def test_invalid_image_is_refused(artifacts, tmp_path: Path, name: str):
    """Nothing is written for the other images."""
    (tmp_path / "text.png").write_text("not an image")
    with (tmp_path / "long.png").open("w") as file:
        file.truncate(MAX_FILE_BYTES + 1)  # must not be read into memory
    with pytest.raises(UserError, match=rf"{name} is not a valid image: [\s\S]*in: .*{name}"):
        reconstruct.reconstruct([tmp_path / name], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_vqvae_without_codes_is_refused(artifacts, tmp_path: Path):
    """A VQ-VAE that does not quantize has no codes to decode."""
    _, artifact = model_file.load_vqvae(artifacts.path("vqvae"))
    config = VQVAEConfig(artifacts.network.levels, QuantizerConfig(mode="none"))
    meta = {**artifact.meta, "network": model_file.network_meta(config)}
    folder = tmp_path / image_commands.MODEL / "vqvae"
    model_file.write(folder, "vqvae", VQVAE(config).state_dict(), meta, history=[], images={})
    with (
        chdir(tmp_path),
        pytest.raises(UserError, match=r"so it has no codes to reconstruct images from\.") as caught,
    ):
        reconstruct.reconstruct([tmp_path / "cat.png"], tmp_path / "out")
    assert caught.value.where == str(image_commands.MODEL / "vqvae") and "mode ema or loss" in caught.value.fix
