"""Comparison of the artifacts of two revisions."""

import subprocess
import tempfile
from contextlib import chdir
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from pipeline import stage_source
from pipeline.commands.same_results import _checkout, compare, differences, versions_at
from stages.errors import UserError
from tests.command_line_project import CommandLineProject

WEIGHTS = {"level_top.weight": torch.arange(6.0).view(2, 3), "level_top.bias": torch.ones(2)}
TABLE = pa.table({"key": ["a", "b"], "top": np.arange(2)})


def artifacts(folder: Path, weights: dict[str, torch.Tensor], table: pa.Table, html: str, png: bytes) -> Path:
    """Write one file of every kind that artifacts hold."""
    model = folder / "artifacts" / "vqvae"
    model.mkdir(parents=True)
    save_file(weights, model / "model.safetensors")
    pq.write_table(table, model / "codes.parquet")
    (model / "report.html").write_text(html)
    (model / "grid.png").write_bytes(png)
    (model / "manifest.json").write_text(folder.name)
    return folder


def test_names_and_digests_are_no_differences(tmp_path: Path):
    """Names of weights, schema metadata, digests in the page and manifests compute nothing."""
    renamed = {name.replace("level_", ""): tensor for name, tensor in WEIGHTS.items()}
    other_table = TABLE.replace_schema_metadata({"vqvae2": "other"})
    before = artifacts(tmp_path / "before", WEIGHTS, TABLE, "digest 0123456789ab", b"png")
    after = artifacts(tmp_path / "after", renamed, other_table, "digest ba9876543210", b"png")
    assert list(differences(before, after)) == []


def test_every_other_difference_is_named(tmp_path: Path):
    """One changed number in weights, codes or text, one changed byte of a picture, and a file that only one has."""
    before = artifacts(tmp_path / "before", WEIGHTS, TABLE, "psnr 26.6", b"png")
    weights = {**WEIGHTS, "level_top.bias": torch.tensor([1.0, 1.0000001])}
    table = TABLE.set_column(1, "top", pa.array([0, 2]))
    after = artifacts(tmp_path / "after", weights, table, "psnr 26.7", b"pnh")
    (after / "artifacts/vqvae/new.csv").touch()
    names = ["codes.parquet", "grid.png", "model.safetensors", "new.csv", "report.html"]
    assert sorted(differences(before, after)) == [f"artifacts/vqvae/{name}" for name in names]


def test_unknown_revision_is_refused():
    """Before anything runs."""
    with pytest.raises(UserError, match="git rev-parse failed: no such revision"):
        compare("no-such-revision")


def test_versions_of_a_revision_are_those_that_it_records(tmp_path: Path):
    """A revision whose own table lacks its source has no version that another one could share."""
    project = CommandLineProject.of_working_tree(tmp_path / "project")
    with chdir(project.folder):
        assert versions_at("HEAD", ["vqvae", "new"]) == {"vqvae": stage_source.source_of_key("vqvae").version}
        Path("pipeline/known_versions.json").write_text('{"versions": {}, "definitions": {}}')
        project.commit()
        with pytest.raises(UserError, match="must have its source in its own table of versions, got none for vqvae"):
            versions_at("HEAD", ["vqvae"])
        Path("pipeline/stage_source.py").write_text("import nothing_at_all\n")
        project.commit()
        with pytest.raises(UserError, match="does not say its versions: ModuleNotFoundError"):
            versions_at("HEAD", ["vqvae"])


def test_failed_checkout_leaves_nothing(tmp_path: Path, monkeypatch):
    """The error is that of Git's checkout, or that of the block, and the temporary folder is removed."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    subprocess.run(["git", "init", "-q", str(tmp_path / "project")], check=True)
    with chdir(tmp_path / "project"):
        with (
            pytest.raises(UserError, match="git worktree failed: fatal: invalid reference: nowhere"),
            _checkout("nowhere"),
        ):
            pass
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", *identity, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
        with pytest.raises(ZeroDivisionError), _checkout("HEAD") as tree:
            (tree / ".git").unlink()  # so Git cannot remove it
            raise ZeroDivisionError
    assert list(temporary.iterdir()) == []
