"""Tests of `vqvae2 import`."""

from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest
import torch

import vqvae2
from pipeline import dvc_yaml, params
from pipeline.commands import export_model, import_model
from stages.errors import UserError
from tests.command_line_project import CommandLineProject
from tests.mini_pipeline import MiniPipeline, without_ray
from tests.rosinality import SIZES, make_weights, their_forward


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.save(make_weights(**SIZES), tmp_path / "vqvae_560.pt")
    return tmp_path / "vqvae_560.pt"


def run(checkpoint: Path, out: Path, image_size: int = 32, format_name: str = "rosinality") -> Path:
    assert import_model.run(format_name, checkpoint, out, image_size=image_size) == 0
    return out


def test_imported_model_encodes_and_decodes_images(checkpoint: Path, tmp_path: Path, capsys):
    """In the Python API, with the codes of their network, and the command prints the settings."""
    model = vqvae2.load(run(checkpoint, tmp_path / "imported"), device="cpu")
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    batch = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    expected, expected_codes = their_forward(make_weights(**SIZES), batch, SIZES["blocks"])
    codes = model.encode(images)
    assert all(np.array_equal(codes[level], grid.numpy()) for level, grid in expected_codes.items())
    decoded = model.decode(codes, format="torch")
    torch.testing.assert_close(decoded, expected.clamp(-1, 1), atol=1 / 255, rtol=0)
    assert "top: 4 x 4 codes of 24 entries with 5 dimensions" in capsys.readouterr().out


def test_imported_model_is_exported(checkpoint: Path, tmp_path: Path):
    """Its card says where it is from."""
    run(checkpoint, tmp_path / "imported")
    with chdir(tmp_path):
        export_model.run(Path("exported"), model=Path("imported"), title="", license_id="mit")
    assert (
        r"imported from vqvae\_560.pt of rosinality/vq-vae-2-pytorch" in (tmp_path / "exported/README.md").read_text()
    )


def test_priors_are_trained_on_the_imported_vqvae(checkpoint: Path, tmp_path: Path):
    """The stages after the VQ-VAE run on it, and the result is a model with priors."""
    pipeline = MiniPipeline(tmp_path / "project")
    with without_ray():
        pipeline.shard()
        run(checkpoint, pipeline.folder / "artifacts", image_size=16)
        pipeline.codes(copies=1)
        for level in pipeline.priors:
            pipeline.prior(level)
    model = vqvae2.load(pipeline.folder, device="cpu")
    assert model.levels["bottom"].entries == SIZES["entries"] and len(model.sample(2, seed=1)) == 2


def test_import_into_a_project_freezes_the_stage(checkpoint: Path, current_project: CommandLineProject):
    """dvc.yaml gains one line, and DVC finds every output of the stage; a second import is refused."""
    before = Path("dvc.yaml").read_text().splitlines()
    run(checkpoint, Path("artifacts"))
    after = Path("dvc.yaml").read_text().splitlines()
    (line,) = [line for line in after if line not in before]
    assert line.startswith("    frozen: true") and after[after.index(line) - 1] == "  vqvae:"
    assert len(after) == len(before) + 1 and params.read(Path("dvc.yaml"))["stages"]["vqvae"]["frozen"] is True
    stage = dvc_yaml.stages(params.read())["vqvae"]
    assert all(Path(path).exists() for path in stage.all_outs)
    with pytest.raises(UserError, match=r"artifacts/vqvae must be a new or empty folder"):
        run(checkpoint, Path("artifacts"))


def test_wrong_use_is_refused(checkpoint: Path, tmp_path: Path):
    """Nothing is written, and what is there stays."""
    (tmp_path / "taken" / "vqvae").mkdir(parents=True)
    (tmp_path / "taken" / "vqvae" / "notes.txt").write_text("mine")
    for arguments, message in (
        ({"format_name": "sonnet"}, "The format must be rosinality, got sonnet"),
        ({"image_size": 36}, "image_size must be a multiple of 8, .* got 36"),
        ({"out": tmp_path / "taken"}, r"must be a new or empty folder, got notes\.txt"),
        ({"checkpoint": tmp_path / "absent.pt"}, r"absent\.pt does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            run(**{"checkpoint": checkpoint, "out": tmp_path / "new"} | arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken", "vqvae_560.pt"]
