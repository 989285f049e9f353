"""Tests of HubModel, the interface of huggingface_hub: without a network, from folders and from a cache."""

import shutil
from pathlib import Path

import numpy as np
import pytest

import vqvae2
from pipeline import model_folder
from stages.errors import UserError
from tests.mini_pipeline import MiniPipeline


@pytest.fixture(scope="module")
def exported(finished_pipeline: MiniPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported model, with a licence."""
    folder = tmp_path_factory.mktemp("hub") / "emoji"
    model_folder.write(finished_pipeline.folder / "artifacts", folder, title="Emoji", license_id="mit")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def cache_of(folder: Path, cache: Path) -> Path:
    """Lay out a repository owner/emoji in a cache of huggingface_hub, as its downloads do."""
    repository, commit = cache / "models--owner--emoji", "0" * 40
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return cache


def test_folder_and_repository_draw_the_codes_of_the_model(exported: Path, tmp_path: Path):
    """An option of huggingface_hub and the device are passed on."""
    expected = vqvae2.load(exported, device="cpu").sample_codes(2, seed=3)
    cache = cache_of(exported, tmp_path)
    for loaded in (
        vqvae2.HubModel.from_pretrained(str(exported), device="cpu"),
        vqvae2.HubModel.from_pretrained("owner/emoji", cache_dir=cache, local_files_only=True, device="cpu"),
    ):
        assert isinstance(loaded, vqvae2.Model) and loaded.device.type == "cpu"
        codes = loaded.sample_codes(2, seed=3)
        assert all(np.array_equal(codes[level], expected[level]) for level in expected)


def test_saved_model_is_the_exported_folder(exported: Path, finished_pipeline: MiniPipeline, tmp_path: Path):
    """A copy of an exported model, with its card and licence; from artifacts, what `vqvae2 export model` writes."""
    vqvae2.HubModel.from_pretrained(exported).save_pretrained(tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(exported)
    artifacts = finished_pipeline.folder / "artifacts"
    vqvae2.HubModel.from_pretrained(artifacts).save_pretrained(tmp_path / "first")
    model_folder.write(artifacts, tmp_path / "again" / "first", title="first", license_id="unknown")
    assert contents(tmp_path / "first") == contents(tmp_path / "again" / "first")


def test_model_is_not_saved_over_files(exported: Path, tmp_path: Path):
    """A folder with files stays as it is."""
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="must be a new or empty folder"):
        vqvae2.HubModel.from_pretrained(exported).save_pretrained(tmp_path)
    assert contents(tmp_path) == {"notes.txt": b"mine"}
