"""Test of training on nodes that share only an S3 bucket, with the loss of a worker, a host and a link."""

import signal
from pathlib import Path

import pytest

from tests.command_line_project import SMOKE, CommandLineProject
from tests.namespace import Namespace
from tests.system.nodes import Nodes, wait_for

SETTINGS = (
    *(*SMOKE, "-S", "cluster=local", "-S", "cluster.max_failures=8"),
    *("-S", "train_vqvae.steps=60", "-S", "train_vqvae.checkpoint_every=10", "-S", "train_vqvae.log_every=5"),
)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> CommandLineProject:
    """A project with shards and no other artifact."""
    folder = tmp_path_factory.mktemp("sharded")
    project = CommandLineProject.of_working_tree(folder / "project")
    project.environment["DVC_SITE_CACHE_DIR"] = str(folder / "dvc")
    project.run(*SETTINGS, "--stage", "shard")
    return project


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_nodes_without_a_shared_disk_survive_the_loss_of_a_worker_a_host_and_a_link(
    sharded: CommandLineProject, tmp_path: Path, namespace: Namespace
):
    """After each loss training resumes from the newest checkpoint, and ends in the bytes of a single machine."""
    single_node = sharded.copy(tmp_path / "single", DVC_SITE_CACHE_DIR=str(tmp_path / "dvc-of-single"))
    single_node.run(*SETTINGS, "--stage", "vqvae")

    # Each slow step gives time to upload the previous checkpoint and to cause the next loss. A fault happens once per
    # node, because its marker file is on the node.
    faults = "slow@vqvae:1:12,kill@vqvae:1:13,slow@vqvae:0:21,slow@vqvae:0:41"
    project = sharded.copy(tmp_path / "project", DVC_SITE_CACHE_DIR=str(tmp_path / "dvc"))
    nodes = Nodes(namespace, project, 4)
    run = nodes.run(*SETTINGS, "--stage", "vqvae", log="run", VQVAE2_FAULT=faults)

    wait_for(run, "Resuming at step 10 of")
    nodes.wait_for_checkpoint(20)
    nodes.raylet(next(iter(nodes.workers()))).send_signal(signal.SIGKILL)
    wait_for(run, "Resuming at step 20 of")
    nodes.wait_for_checkpoint(40)
    nodes.disconnect(next(iter(nodes.workers())))
    wait_for(run, "Resuming at step 40 of")
    result = run.wait(600)
    assert result.status == 0, result.output
    assert project.digests("vqvae") == single_node.digests("vqvae")
