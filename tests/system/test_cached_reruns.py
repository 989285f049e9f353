"""A change reruns what depends on it and nothing else; what ran once is never run again."""

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
from projects import SMOKE, Done, Project, until


def test_a_sampling_setting_reruns_sampling_and_what_is_measured(project: Project):
    """The dry run names the setting with both values, the run does as announced, and going back runs nothing."""
    before = project.digests()
    change = (*SMOKE, "-S", "sample.temperature=0.9")
    plan = project.run(*change, "--dry-run")
    assert plan.output.splitlines()[:2] == [
        "sample        would run: sample.temperature 1.0 -> 0.9",
        "evaluate      would run: sample runs before it",
    ]
    assert project.digests() == before
    assert project.run(*change).told("runs") == {"sample", "evaluate"}
    after = project.digests()
    assert {name for name in before if after[name] != before[name]} == {"samples", "report"}

    back = project.run(*SMOKE)
    assert back.told("runs") == set()
    assert back.told("restored from cache") == {"sample", "evaluate"}
    assert project.digests() == before


def test_where_a_run_happens_reruns_nothing(project: Project):
    """Another cluster is no other result."""
    assert project.run(*SMOKE, "-S", "cluster=local").output == "Everything is up to date.\n"


ONE_PRIOR = (*SMOKE, "-S", "priors.top.train.learning_rate=0.002")


def test_one_priors_settings_concern_no_other_prior(project: Project):
    """The other prior stays; sampling and measuring follow."""
    assert _planned(project.run(*ONE_PRIOR, "--dry-run")) == ["prior_top", "sample", "evaluate"]


@pytest.mark.slow
def test_one_prior_is_trained_anew_when_its_settings_change(project: Project):
    """What is not asked for stays, although it is out of date now."""
    before = project.digests()
    assert project.run(*ONE_PRIOR, "--stage", "prior_top").told("runs") == {"prior_top"}
    after = project.digests()
    assert {name for name in before if after[name] != before[name]} == {"priors/top"}


@pytest.mark.slow
def test_dvc_experiments_compose_the_same_settings(project: Project):
    """`dvc exp run -S` composes conf/ as our command does, so that it runs just what changed."""
    done = project.call("dvc", "exp", "run", *SMOKE, "-S", "evaluate.nearest_images=2")
    assert re.findall("Running stage '(.+)'", done.output) == ["evaluate"]
    assert project.run().output == "Everything is up to date.\n"


THREE_LEVELS = (*SMOKE, "-S", "vqvae=three_level", "-S", "+prior@priors.middle=smoke")


def test_a_third_level_brings_its_prior(project: Project):
    """Two choices add a level: its prior is a stage by itself, and what comes before the levels stays."""
    planned = _planned(project.run(*THREE_LEVELS, "--dry-run"))
    assert set(planned) == {"vqvae", "codes", "prior_top", "prior_bottom", "prior_middle", "sample", "evaluate"}


@pytest.mark.slow
def test_a_third_level_runs_to_its_report_and_leaves_again(project: Project):
    """Three levels are trained, sampled and measured; two levels later, everything is as it was before."""
    before = project.digests()
    assert "prior_middle" in project.run(*THREE_LEVELS).told("runs")
    assert "priors/middle" in project.digests()
    back = project.run(*SMOKE)
    assert back.told("runs") == set()
    assert project.digests() == before


def test_a_folder_serves_another_checkout(project: Project, tmp_path: Path):
    """After `dvc push`, a fresh clone has everything without running a stage."""
    project.call("dvc", "remote", "add", "--default", "store", str(tmp_path / "store"))
    _hand_over(project, tmp_path)


@pytest.mark.slow
def test_an_s3_store_serves_another_checkout(project: Project, tmp_path: Path, s3: str):
    """The same with an S3-compatible server."""
    project.environment.update(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test", AWS_DEFAULT_REGION="us-east-1")
    project.call("dvc", "remote", "add", "--default", "store", "s3://bucket/vqvae2")
    project.call("dvc", "remote", "modify", "store", "endpointurl", s3)
    _hand_over(project, tmp_path)


def _hand_over(project: Project, tmp_path: Path) -> None:
    project.call("dvc", "push", "--run-cache")
    project.commit()
    clone = project.clone(tmp_path / "clone", DVC_SITE_CACHE_DIR=str(tmp_path / "dvc-of-clone"))
    done = clone.run("--pull")
    assert done.told("runs") == set()
    assert clone.digests() == project.digests()
    assert clone.run().output == "Everything is up to date.\n"


def _planned(done: Done) -> list[str]:
    return re.findall(r"^(\w+) +would run:", done.output, re.MULTILINE)


@pytest.fixture
def s3(tmp_path: Path) -> Iterator[str]:
    """The address of an S3-compatible server with one empty bucket."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with (tmp_path / "s3.log").open("w") as log:
        server = subprocess.Popen(
            [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)],
            env={**os.environ, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"},
            stdout=log,
            stderr=log,
        )
        try:
            until(lambda: _answers(address), 60)
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
