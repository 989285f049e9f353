"""Tests of `vqvae2 export model`: the folder works on another machine, and its card states what it holds."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest
from ruamel.yaml import YAML

import vqvae2
from pipeline.commands import export_model, sample
from stages.errors import UserError
from stages.formats import artifact
from tests.mini_pipeline import MiniPipeline

ROOT = Path(__file__).parents[3]
DRAW = """
import sys, vqvae2
codes = vqvae2.load(sys.argv[1], device="cpu").sample_codes(3, seed=5)
for level, grid in codes.items():
    print(level, grid.tobytes().hex())
"""


def export(out: Path, model: Path | None = None, title: str = "", license_id: str = "unknown") -> Path:
    assert export_model.run(out, model=model, title=title, license_id=license_id) == 0
    return out


def front_matter(folder: Path) -> dict:
    return YAML(typ="safe").load((folder / "README.md").read_text(encoding="utf-8").split("---\n")[1])


def test_copy_without_a_project_draws_the_same_codes(artifacts: MiniPipeline, tmp_path: Path):
    """Byte for byte, in another process whose folder holds nothing else."""
    exported = export(tmp_path / "exported")
    shutil.move(exported, tmp_path / "colleague" / "model")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", DRAW, "model"],
        cwd=tmp_path / "colleague",
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    codes = vqvae2.load("artifacts", device="cpu").sample_codes(3, seed=5)
    expected = "".join(f"{level} {grid.tobytes().hex()}\n" for level, grid in codes.items())
    assert (result.stdout, result.stderr) == (expected, "")


def test_sampling_rule_is_exported(artifacts: MiniPipeline, tmp_path: Path):
    """Samples of the command are those of the stage's rule, which config.json records."""
    model = tmp_path / "model"
    for name in ("vqvae", "priors"):
        shutil.copytree(artifacts.path(name), model / name)
    with artifact.commit_folder(model / "samples", "samples", _samples_meta(artifacts)):
        pass
    exported = export(tmp_path / "exported", model)
    assert json.loads((exported / "config.json").read_bytes())["sampling"] == {
        "temperature": 0.5, "top_k": 3, "top_p": 0.9
    }  # fmt: skip
    drawn = [vqvae2.load(folder, device="cpu").sample_codes(4, seed=1) for folder in (model, exported)]
    assert all(np.array_equal(drawn[0][level], drawn[1][level]) for level in drawn[0])
    assert sample.sampling_rule(exported).top_k == 3


def _samples_meta(artifacts: MiniPipeline) -> dict:
    meta = dict(artifact.read(artifacts.path("samples"), "samples").meta)
    return meta | {"count": 0, "temperature": 0.5, "top_k": 3, "top_p": 0.9}


def test_equal_models_give_equal_bytes(artifacts: MiniPipeline, tmp_path: Path):
    """Every file but the title, which is that of the folder by default."""
    first, second = (export(tmp_path / name, title="Shades") for name in ("first", "second"))
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(second) for path in second.rglob("*") if path.is_file())
    assert all((first / file).read_bytes() == (second / file).read_bytes() for file in files)


def test_card_states_data_settings_and_licence(artifacts: MiniPipeline, tmp_path: Path):
    """The front matter is that of the hub; digests, pictures and classes are those of the artifacts."""
    exported = export(tmp_path / "shades", license_id="cc-by-4.0")
    text = (exported / "README.md").read_text(encoding="utf-8")
    metadata = front_matter(exported)
    assert metadata["license"] == "cc-by-4.0" and metadata["library_name"] == "vqvae2" and "model-index" not in metadata
    for name, kind in (("vqvae", "vqvae"), ("shards", "shards"), ("codes", "codes"), ("priors/top", "prior")):
        assert artifact.read(artifacts.path(name), kind).digest in text
    assert "# shades\n" in text and "12 train, 4 validation" in text and "Classes: dark, light." in text
    assert "![The first 10 samples of the pipeline](samples.png)" in text and (exported / "samples.png").is_file()
    assert "(vqvae/reconstructions.png)" in text and (exported / "vqvae/reconstructions.png").is_file()
    assert "| top | 2 x 2 | 16 | 4 | PixelSNAIL | 2 | 8 |" in text and "12 steps" in text


def test_metrics_are_those_of_a_report_of_this_model(artifacts: MiniPipeline, tmp_path: Path):
    """In the table and for the hub; a report of another model adds none."""
    model = tmp_path / "model"
    for name in ("vqvae", "priors"):
        shutil.copytree(artifacts.path(name), model / name)
    vqvae = artifact.read(model / "vqvae", "vqvae").digest
    priors = {f"prior {name}": artifact.read(model / "priors" / name, "prior").digest for name in ("top", "bottom")}
    metrics = {
        "reference": "validation",
        "compared": {"samples": {"kid_efficientnet_lite0": 0.125}},
        "reconstruction": {"validation": {"psnr": 26.5}},
        "likelihood": {"top": {"train": {"nats_per_code": 1.75}}},
    }
    for digest, expected in ((vqvae, {"kid": 0.125, "psnr": 26.5, "nll_top": 1.75}), ("0" * 64, {})):
        meta = {"inputs": {"vqvae": digest, **priors}, "networks": {"efficientnet_lite0": "0" * 64}}
        with artifact.commit_folder(model / "report", "report", meta) as folder:
            (folder / "metrics.json").write_text(json.dumps(metrics))
        exported = export(tmp_path / f"exported-{digest[:4]}", model)
        results = front_matter(exported).get("model-index", [{"results": [{"metrics": []}]}])[0]["results"][0]
        assert {metric["name"]: metric["value"] for metric in results["metrics"]} == expected
        assert ("| kid | 0.125 |" in (exported / "README.md").read_text(encoding="utf-8")) == bool(expected)


def test_texts_of_the_user_have_no_meaning_in_the_card(artifacts: MiniPipeline, tmp_path: Path):
    """A title with markup stays text."""
    exported = export(tmp_path / "exported", title="<b>*mine*</b> | [x](y)")
    text = (exported / "README.md").read_text(encoding="utf-8")
    assert r"# &lt;b&gt;\*mine\*&lt;/b&gt; \| \[x\](y)" in text


def test_vqvae_without_priors_is_exported(artifacts: MiniPipeline, tmp_path: Path, capsys):
    """The copy encodes and decodes only, and the command says so."""
    shutil.copytree(artifacts.path("vqvae"), tmp_path / "model" / "vqvae")
    exported = export(tmp_path / "exported", tmp_path / "model")
    assert "There are no priors" in capsys.readouterr().out
    assert "sample(" not in (exported / "README.md").read_text(encoding="utf-8")
    assert vqvae2.load(exported, device="cpu").levels == vqvae2.load("artifacts", device="cpu").levels


def test_wrong_use_is_refused(artifacts: MiniPipeline, tmp_path: Path):
    """Nothing is written, and what is there stays."""
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"must be a new or empty folder, got notes\.txt"):
        export(tmp_path / "taken")
    (tmp_path / "here").mkdir()
    with chdir(tmp_path / "here"), pytest.raises(UserError, match=r"must be a new folder .* got the current folder"):
        export(Path())
    (tmp_path / "here").rmdir()
    with pytest.raises(UserError, match=r"--license must be an identifier .* got 'MIT License'"):
        export(tmp_path / "new", license_id="MIT License")
    with pytest.raises(UserError, match="A model folder must hold vqvae/"):
        export(tmp_path / "new", tmp_path)
    damaged = tmp_path / "damaged"
    shutil.copytree(artifacts.path("vqvae"), damaged / "vqvae")
    (damaged / "vqvae" / "curves.csv").write_bytes((damaged / "vqvae" / "curves.csv").read_bytes()[::-1])
    with pytest.raises(UserError, match=r"curves\.csv is damaged"):
        export(tmp_path / "new", damaged)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", "taken"]


@pytest.mark.parametrize(
    "change", [{"format": 2}, {"sampling": {"temperature": 0.0, "top_k": 0, "top_p": 1.0}}, {"sampling": []}]
)
def test_config_of_another_form_is_refused(artifacts: MiniPipeline, tmp_path: Path, change: dict):
    """The error names the file and the fix."""
    exported = export(tmp_path / "exported")
    path = exported / "config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | change))
    with pytest.raises(UserError, match=r"not valid: [\s\S]*config\.json[\s\S]*Export or download the model again"):
        vqvae2.load(exported, device="cpu").sample_codes(1)
