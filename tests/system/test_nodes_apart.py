"""Nodes that share an S3 bucket and nothing else: what is lost, of a worker, a host and a link, is found again."""

import signal
from pathlib import Path

import pytest
from nodes import Nodes, wait_for
from projects import SMOKE, Namespace, Project

SETTINGS = (
    *(*SMOKE, "-S", "cluster=local", "-S", "cluster.max_failures=8"),
    *("-S", "train_vqvae.steps=60", "-S", "train_vqvae.checkpoint_every=10", "-S", "train_vqvae.log_every=5"),
)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Project:
    """A project with shards and no more."""
    folder = tmp_path_factory.mktemp("sharded")
    project = Project.of_working_tree(folder / "project")
    project.environment["DVC_SITE_CACHE_DIR"] = str(folder / "dvc")
    project.run(*SETTINGS, "--stage", "shard")
    return project


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_nodes_that_share_only_a_bucket_lose_a_worker_a_host_and_a_link(
    sharded: Project, tmp_path: Path, namespace: Namespace
):
    """After each loss training goes on from the newest checkpoint, and it ends in the bytes of one machine."""
    alone = sharded.copy(tmp_path / "alone", DVC_SITE_CACHE_DIR=str(tmp_path / "dvc-of-alone"))
    alone.run(*SETTINGS, "--stage", "vqvae")

    # Each pause leaves time for the checkpoint before it to arrive, and for what is to be lost. A fault comes once per
    # node: that is where its marker lies.
    faults = "slow@vqvae:1:12,kill@vqvae:1:13,slow@vqvae:0:21,slow@vqvae:0:41"
    project = sharded.copy(tmp_path / "project", DVC_SITE_CACHE_DIR=str(tmp_path / "dvc"))
    nodes = Nodes(namespace, project, 4)
    run = nodes.run(*SETTINGS, "--stage", "vqvae", log="run", VQVAE2_FAULT=faults)

    wait_for(run, "Resuming at step 10 of")
    nodes.wait_for_checkpoint(20)
    nodes.raylet(next(iter(nodes.workers()))).send_signal(signal.SIGKILL)
    wait_for(run, "Resuming at step 20 of")
    nodes.wait_for_checkpoint(40)
    nodes.cut(next(iter(nodes.workers())))
    wait_for(run, "Resuming at step 40 of")
    done = run.wait(600)
    assert done.status == 0, done.output
    assert project.digests("vqvae") == alone.digests("vqvae")
