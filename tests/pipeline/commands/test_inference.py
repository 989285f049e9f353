"""What is drawn and reconstructed by hand is what the pipeline draws and reconstructs."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.config import QuantizerConfig, VQVAEConfig
from models.vqvae import VQVAE
from pipeline.commands import inference
from stages import codes
from stages.config import CodesConfig, SampleConfig
from stages.errors import UserError
from stages.formats import model_file
from stages.formats.samples import open_samples
from stages.formats.shards import open_shards
from stages.images.sources import LARGEST_FILE


@pytest.fixture
def here(project, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in the project's folder, as a user does."""
    monkeypatch.chdir(project.folder)
    return project.folder


def test_drawn_images_are_those_of_the_pipeline(project, here: Path, tmp_path: Path):
    """Sample by sample, under names that say number and class."""
    inference.sample(tmp_path / "out", SampleConfig(count=5), seed=0)
    files = sorted((tmp_path / "out").glob("0*.png"))
    drawn = np.stack([np.asarray(Image.open(path)) for path in files])
    assert (drawn == open_samples(project.path("samples")).images(0, 5)).all()
    assert {path.stem[7:] for path in files} == {"dark", "light"} and (tmp_path / "out" / "sheet.png").exists()


def test_more_entries_than_there_are_cannot_be_kept(project, here: Path, tmp_path: Path):
    """top_k counts entries of the levels, and the letter says how many there are."""
    entries = max(level.entries for level in project.network.levels.values())
    inference.sample(tmp_path / "out", SampleConfig(count=1, top_k=entries), seed=0)
    with pytest.raises(UserError, match=rf"top_k is {entries + 1}[\s\S]*Use 1 to {entries}, or 0"):
        inference.sample(tmp_path / "other", SampleConfig(count=1, top_k=entries + 1), seed=0)
    assert not (tmp_path / "other").exists()


def test_an_image_is_reconstructed_from_each_prefix_of_levels(project, here: Path, tmp_path: Path):
    """A line names the levels and their errors; the picture shows the image and both reconstructions."""
    image = open_shards(project.path("shards")).split("validation").read(0)
    Image.fromarray(image).save(tmp_path / "cat.png")
    (line,) = inference.reconstruct([tmp_path / "cat.png"], tmp_path / "out")
    assert "cat.png: top " in line and ", top+bottom " in line and line.endswith(" dB")
    with Image.open(tmp_path / "out" / "000-cat.png") as picture:
        assert picture.width > 2 * picture.height


@pytest.mark.parametrize("name", ["absent.png", "text.png", "long.png"])
def test_what_is_no_image_is_named(here: Path, tmp_path: Path, name: str):
    """Nothing is written for the others."""
    (tmp_path / "text.png").write_text("no picture")
    with (tmp_path / "long.png").open("w") as file:
        file.truncate(LARGEST_FILE + 1)  # would be read whole
    with pytest.raises(UserError, match=rf"cannot be used[\s\S]*{name}"):
        inference.reconstruct([tmp_path / name], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_without_codes_is_refused(project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its codes are all zero, and the pictures would be of nothing."""
    _, found = model_file.load_vqvae(project.path("vqvae"))
    config = VQVAEConfig(project.network.levels, QuantizerConfig(mode="none"))
    meta = {**found.meta, "network": model_file.network_meta(config)}
    model_file.write(tmp_path / inference.VQVAE, "vqvae", VQVAE(config).state_dict(), meta, history=[], pictures={})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"so it has no codes to reconstruct images from\.") as caught:
        inference.reconstruct([tmp_path / "cat.png"], tmp_path / "out")
    assert caught.value.where == str(inference.VQVAE) and "mode ema or loss" in caught.value.fix
    with pytest.raises(UserError, match=r"does not quantize, so it has no codes\.") as caught:
        codes.run(
            project.path("shards"), inference.VQVAE, tmp_path / "codes", tmp_path / "codes.json",
            codes=CodesConfig(), augment=project.augment, seed=0, run=project.run("codes", "none"),
        )  # fmt: skip
    assert caught.value.where == "params.yaml: vqvae.quantizer.mode" and "ema or loss" in caught.value.fix
