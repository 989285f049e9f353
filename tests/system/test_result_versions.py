"""Tests of result versions in whole runs: edits of the source, and results that a new release takes over."""

import json
import re
import shutil

import pytest

from pipeline.dvc_yaml import VERSIONS_STAGE
from tests.command_line_project import CommandLineProject


@pytest.fixture
def project(project: CommandLineProject) -> CommandLineProject:
    """A finished project that runs its own copy of the source."""
    project.environment["PYTHONPATH"] = str(project.folder)
    return project


def edit(project: CommandLineProject, name: str, old: str, new: str) -> None:
    path = project.folder / name
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_comment_reruns_nothing_and_a_constant_reruns_the_vqvae(project: CommandLineProject):
    """Both under `vqvae2 run` and under plain `dvc repro`."""
    edit(project, "models/quantizer.py", "class Quantizer(nn.Module):", "# A comment.\nclass Quantizer(nn.Module):")
    assert project.run().output == "Everything is up to date.\n"
    assert re.findall("Running stage '(.+)'", project.call("dvc", "repro").output) == [VERSIONS_STAGE]

    edit(project, "models/quantizer.py", "2048", "1024")
    first_line = project.run("--dry-run").output.splitlines()[0]
    assert re.fullmatch(
        r"vqvae +would run \(last run took .*\): the code that determines its result changed", first_line
    )
    project.call("vqvae2", "versions", "--write")
    assert "vqvae" in json.loads(project.call("dvc", "status", "--json").output)


@pytest.mark.slow
def test_results_survive_a_release_that_changes_dvc_yaml(project: CommandLineProject):
    """DVC's own record of runs no longer matches. Every stage restores its result in seconds and computes nothing."""
    before = project.digests()
    edit(project, "dvc.yaml", "cmd: exec vqvae2 stage", "cmd: exec  vqvae2 stage")
    shutil.rmtree(project.folder / ".dvc" / "cache" / "runs")
    output = project.call("dvc", "repro").output
    assert len(re.findall("restored the finished result of version", output)) == 7
    assert project.digests() == before
    assert project.run().output == "Everything is up to date.\n"


@pytest.mark.slow
def test_kept_result_is_not_lost_when_its_inputs_change(project: CommandLineProject):
    """DVC deletes a result before its stage runs. The stage refuses to compute another one and puts it back."""
    edit(project, "models/quantizer.py", "2048", "1024")
    edit(project, "params.yaml", "keep_results: []", "keep_results: [vqvae]")
    files = ["artifacts/vqvae/manifest.json", "metrics/vqvae.json", "plots/vqvae/training.csv"]
    before = [(project.folder / name).read_bytes() for name in files]
    edit(project, "params.yaml", "image_format: png", "image_format: jpeg")
    failed = project.call("dvc", "repro", "vqvae", status=255)  # DVC's status of any failed stage
    assert "vqvae cannot run: keep_results keeps its result" in failed.output
    assert [(project.folder / name).read_bytes() for name in files] == before
