"""Tests of DVC's cache: a change reruns only the stages that depend on it."""

import os
import re
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.dvc_yaml import VERSIONS_STAGE
from tests.command_line_project import SMOKE, CommandLineProject, CommandResult
from tests.namespace import wait_until


def test_an_evaluation_setting_reruns_evaluate_only(project: CommandLineProject):
    """The dry run shows the setting with both values, the run does what it announced, and reverting runs nothing."""
    before = project.digests()
    change = (*SMOKE, "-S", "evaluate.nearest_images=2")
    plan = project.run(*change, "--dry-run")
    assert re.search(r"^Changes against the last run:\n  evaluate\.nearest_images \d+ -> 2$", plan.output, re.MULTILINE)
    assert list(_planned(plan)) == ["evaluate"]
    assert project.digests() == before
    assert project.run(*change).stages("runs") == {"evaluate"}
    after = project.digests()
    assert {name for name in before if after[name] != before[name]} == {"report"}

    reverted = project.run(*SMOKE)
    assert reverted.stages("runs") == set()
    assert reverted.stages("restored from cache") == {"evaluate"}
    assert project.digests() == before


@pytest.mark.slow
def test_a_sampling_setting_reruns_sample_and_evaluate(project: CommandLineProject):
    """Both artifacts change, and nothing else."""
    before = project.digests()
    change = (*SMOKE, "-S", "sample.temperature=0.9")
    assert _planned(project.run(*change, "--dry-run")) == {
        "sample": "sample.temperature 1.0 -> 0.9",
        "evaluate": "sample runs before it",
    }
    assert project.run(*change).stages("runs") == {"sample", "evaluate"}
    after = project.digests()
    assert {name for name in before if after[name] != before[name]} == {"samples", "report"}


def test_another_cluster_reruns_nothing(project: CommandLineProject):
    """A cluster's settings do not change results."""
    assert project.run(*SMOKE, "-S", "cluster=local").output == "Everything is up to date.\n"


ONE_PRIOR = (*SMOKE, "-S", "priors.top.train.learning_rate=0.002")


def test_settings_of_one_prior_rerun_no_other_prior(project: CommandLineProject):
    """Only that prior, sample and evaluate are planned."""
    assert list(_planned(project.run(*ONE_PRIOR, "--dry-run"))) == ["prior_top", "sample", "evaluate"]


@pytest.mark.slow
def test_a_single_stage_can_be_rerun(project: CommandLineProject):
    """Only the requested stage runs; later stages stay, although they are out of date."""
    before = project.digests()
    assert project.run(*ONE_PRIOR, "--stage", "prior_top").stages("runs") == {"prior_top"}
    after = project.digests()
    assert {name for name in before if after[name] != before[name]} == {"priors/top"}


@pytest.mark.slow
def test_dvc_experiments_compose_the_same_settings(project: CommandLineProject):
    """`dvc exp run -S` composes conf/ as `vqvae2 run -S` does, so it runs only the changed stage."""
    experiment = project.call("dvc", "exp", "run", *SMOKE, "-S", "evaluate.nearest_images=2")
    assert re.findall("Running stage '(.+)'", experiment.output) == [VERSIONS_STAGE, "evaluate"]
    assert project.run().output == "Everything is up to date.\n"


THREE_LEVELS = (*SMOKE, "-S", "vqvae=three_level", "-S", "+prior@priors.middle=smoke")


def test_a_third_level_adds_its_prior(project: CommandLineProject):
    """Two overrides add a level, whose prior is a stage; the shards are not rebuilt."""
    planned = _planned(project.run(*THREE_LEVELS, "--dry-run"))
    assert set(planned) == {"vqvae", "codes", "prior_top", "prior_bottom", "prior_middle", "sample", "evaluate"}


@pytest.mark.slow
def test_a_third_level_can_be_added_and_removed(project: CommandLineProject):
    """Three levels are trained, sampled and evaluated; back at two levels, all artifacts are as before."""
    before = project.digests()
    assert "prior_middle" in project.run(*THREE_LEVELS).stages("runs")
    assert "priors/middle" in project.digests()
    assert project.run(*SMOKE).stages("runs") == set()
    assert project.digests() == before


def test_a_clone_restores_all_artifacts_from_a_folder(project: CommandLineProject, tmp_path: Path):
    """After `dvc push`, a clone restores everything without running a stage."""
    project.call("dvc", "remote", "add", "--default", "store", str(tmp_path / "store"))
    _check_clone_restores(project, tmp_path)


@pytest.mark.slow
def test_a_clone_restores_all_artifacts_from_s3(project: CommandLineProject, tmp_path: Path, s3: str):
    """The remote is an S3-compatible server."""
    project.environment.update(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test", AWS_DEFAULT_REGION="us-east-1")
    project.call("dvc", "remote", "add", "--default", "store", "s3://bucket/vqvae2")
    project.call("dvc", "remote", "modify", "store", "endpointurl", s3)
    _check_clone_restores(project, tmp_path)


def _check_clone_restores(project: CommandLineProject, tmp_path: Path) -> None:
    project.call("dvc", "push", "--run-cache")
    project.commit()
    clone = project.clone(tmp_path / "clone", DVC_SITE_CACHE_DIR=str(tmp_path / "dvc-of-clone"))
    assert clone.run("--pull").stages("runs") == set()
    assert clone.digests() == project.digests()
    assert clone.run().output == "Everything is up to date.\n"


def _planned(dry_run: CommandResult) -> dict[str, str]:
    """Return the stages that would run, with the reasons."""
    return dict(re.findall(r"^(\w+) +would run(?: \(last run took .*\))?: (.*)$", dry_run.output, re.MULTILINE))


@pytest.fixture
def s3(tmp_path: Path) -> Iterator[str]:
    """The address of an S3-compatible server with one empty bucket."""
    with socket.create_server(("127.0.0.1", 0)) as server_socket:  # finds a free port
        port = server_socket.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with (tmp_path / "s3.log").open("w") as log:
        server = subprocess.Popen(
            [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)],
            env={**os.environ, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"},
            stdout=log,
            stderr=log,
        )
        try:
            wait_until(lambda: _answers(address), 60)
            urllib.request.urlopen(urllib.request.Request(f"{address}/bucket", method="PUT"), timeout=10).close()
            yield address
        finally:
            server.terminate()
            server.wait(10)


def _answers(address: str) -> bool:
    try:
        urllib.request.urlopen(address, timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True
