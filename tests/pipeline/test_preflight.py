"""Tests of the checks before a run."""

import socket
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import params, preflight, shared_cluster
from pipeline.checks import machine
from pipeline.commands import config
from stages.cluster_config import StageClusterConfig
from stages.errors import UserError
from stages.formats import artifact

STAGES = ["shard", "vqvae", "codes", "prior@top", "prior@bottom", "sample", "evaluate"]


@pytest.fixture
def settings(current_project):
    """The settings of a project that is the current folder."""
    return params.load()


def write_shards(*classes: str) -> None:
    with artifact.commit_folder(Path("artifacts/shards"), "shards", {"classes": list(classes)}):
        pass


def test_unknown_class_is_refused(settings):
    """Classes are read from the shards, or from the names in the source if shards are to be written."""
    settings = replace(settings, sample=replace(settings.sample, classes=("flags",)))
    after_shard = STAGES[1:]
    preflight.check(settings, STAGES, "params.yaml")
    preflight.check(settings, after_shard, "params.yaml")  # without shards the classes are unknown
    write_shards("cat", "dog")
    preflight.check(settings, STAGES, "params.yaml")
    preflight.check(settings, STAGES[:2], "params.yaml")  # `sample` does not run
    with pytest.raises(UserError, match=r"'flags' is not a valid class[\s\S]*sample.classes\n  fix: .*cat, dog"):
        preflight.check(settings, after_shard, "params.yaml")
    write_shards(*(f"n{number}" for number in range(1000)))
    with pytest.raises(UserError, match=r"fix: Use any of: n0, n1, .*, n19 and 980 more"):
        preflight.check(settings, after_shard, "params.yaml")
    unlabeled = replace(settings, dataset=replace(settings.dataset, labels="none"))
    with pytest.raises(UserError, match=r"There are no classes, got [\s\S]*fix: Name no class"):
        preflight.check(unlabeled, STAGES, "params.yaml")


def test_missing_images_are_refused_unless_results_may_be_pulled(settings):
    """A run with `pull` fetches results, so it needs no images."""
    settings = replace(
        settings,
        dataset=replace(settings.dataset, source="nowhere"),
        sample=replace(settings.sample, classes=("flags",)),
    )
    preflight.check(settings, ["shard", "vqvae", "sample"], "params.yaml", pull=True)
    with pytest.raises(UserError) as caught:
        preflight.check(settings, ["shard"], "params.yaml")
    assert caught.value.where == "nowhere"


def test_missing_gpus_are_refused_unless_results_may_be_pulled(settings):
    """The fix keeps the overrides of params.yaml other than the cluster's."""
    config.run(["experiment=smoke", "cluster=gpu", "dataset.name='a b'"], write=True)
    cluster = replace(settings.cluster, workers=2, gpus_per_worker=500)  # more than any machine has
    settings = replace(settings, cluster=cluster)
    preflight.check(settings, ["vqvae"], "params.yaml", pull=True)
    with pytest.raises(UserError, match=rf"requires 1000 GPUs, and this machine has {machine.gpu_count()}\.") as caught:
        preflight.check(settings, ["vqvae"], "params.yaml")
    assert caught.value.where == "params.yaml: cluster.gpus_per_worker"
    assert """-S experiment=smoke -S 'dataset.name='"'"'a b'"'"'' -S cluster=local, or set""" in caught.value.fix


def test_gpus_are_required_for_the_stages_that_run(settings):
    """A stage without GPUs runs on a machine that has none, and the error names the stage that needs most."""
    stages = {"shard": StageClusterConfig(gpus_per_worker=0), "prior": StageClusterConfig(workers=3)}
    cluster = replace(settings.cluster, workers=2, gpus_per_worker=500, stages=stages)
    settings = replace(settings, cluster=cluster)
    preflight.check_gpus(cluster, ["shard"], "params.yaml", {})
    preflight.check_gpus(cluster, [], "params.yaml", {})
    with pytest.raises(UserError, match="cluster requires 1000 GPUs for vqvae, and"):
        preflight.check_gpus(cluster, ["shard", "vqvae"], "params.yaml", {})
    with pytest.raises(UserError, match="cluster requires 1500 GPUs for prior_top, and"):
        preflight.check(settings, ["shard", "vqvae", "prior@top"], "params.yaml")


def test_of_a_range_of_workers_only_the_fewest_are_required(settings):
    """The others are added where there are GPUs for them."""
    cluster = replace(settings.cluster, workers=(2, 8), gpus_per_worker=500)
    with pytest.raises(UserError, match="cluster requires 1000 GPUs, and"):
        preflight.check_gpus(cluster, ["vqvae"], "params.yaml", {})


def test_advice_on_missing_gpus_repeats_no_setting_of_the_cluster(settings):
    """`-S cluster=local` would not undo it."""
    config.run(["experiment=smoke", "+cluster.stages.vqvae.gpus_per_worker=500"], write=True)
    with pytest.raises(UserError, match="for vqvae") as caught:
        preflight.check(params.load(), ["vqvae"], "params.yaml")
    assert caught.value.fix.startswith("Use -S experiment=smoke -S cluster=local, or set")


def test_gpus_of_a_named_cluster_are_not_checked(settings):
    """The machine of the command may have no GPU if RAY_ADDRESS names a cluster."""
    cluster = replace(settings.cluster, gpus_per_worker=500)
    preflight.check_gpus(cluster, ["vqvae"], "params.yaml", {"RAY_ADDRESS": "127.0.0.1:6379"})


def unused_address():
    """Return an address of this machine at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def test_dead_cluster_is_refused_before_dvc_starts(project):
    """DVC deletes the outputs of a stage before it runs; the check is bounded in time and prints one error."""
    done = project.command("run", "-S", "experiment=smoke", RAY_ADDRESS=unused_address())
    assert done.returncode == 3 and done.stderr.count("error:") == 1 and "does not answer" in done.stderr
    assert not (project.folder / "runs" / "pipeline").exists()


def test_first_stage_of_plain_dvc_asks_the_quick_checks(project):
    """`vqvae2 run` has asked all of them when it starts that stage."""
    address = unused_address()
    done = project.command("versions", "--write", RAY_ADDRESS=address)
    assert done.returncode == 3 and f"RAY_ADDRESS={address}" in done.stderr
    done = project.command("versions", "--write", RAY_ADDRESS=address, **{shared_cluster.FOLDER: "folder"})
    assert done.returncode == 0, done.stderr


def test_warnings_are_printed_and_do_not_stop_a_run(settings, monkeypatch, capsys):
    """A server of MLflow may answer again while the run goes on."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:hunter2@{unused_address()}")
    preflight.check(settings, ["vqvae"], "params.yaml")
    message = capsys.readouterr().err
    assert "note: mlflow: " in message and "MLflow does not answer" in message and "sync-metrics" in message
    assert "hunter2" not in message and ".." not in message
