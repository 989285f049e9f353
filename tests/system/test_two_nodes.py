"""Test of a run on an existing cluster of two nodes with one CPU each."""

import secrets
from pathlib import Path

import pytest

from tests.command_line_project import SMOKE, CommandLineProject
from tests.namespace import Namespace, wait_until

PORT = 6379
NODE = ("--node-ip-address=127.0.0.1", "--num-cpus=1", "--object-store-memory=200000000", "--disable-usage-stats")


@pytest.mark.slow
def test_two_nodes_train_together_and_write_the_same_shards_and_codes(
    first_run: tuple[CommandLineProject, object], tmp_path: Path, namespace: Namespace
):
    """Each node runs a training worker; artifacts that do not depend on the order of sums are byte-equal."""
    single_node = first_run[0]
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    project = single_node.copy(tmp_path / "project", DVC_SITE_CACHE_DIR=str(tmp_path / "dvc"), **secret)
    head = ("--head", f"--port={PORT}", "--include-dashboard=false")
    for name, role in (("head", head), ("node", (f"--address=127.0.0.1:{PORT}",))):
        job = namespace.start(project, "ray", "start", "--block", *role, *NODE, log=name)
        wait_until(lambda job=job: "Ray runtime started" in job.output, 100, lambda job=job: job.output)

    on_cluster = CommandLineProject(project.folder, {**project.environment, "RAY_ADDRESS": f"127.0.0.1:{PORT}"})
    settings = (*SMOKE, "-S", "cluster=local")
    for stage in ("shard", "codes"):
        job = namespace.start(on_cluster, "vqvae2", "run", *settings, "--force", "--only", "--stage", stage, log=stage)
        assert job.wait(200).status == 0, job.output
    assert project.digests("shards", "codes") == single_node.digests("shards", "codes")

    longer = ("-S", "train_vqvae.steps=40", "--stage", "vqvae")
    job = namespace.start(on_cluster, "vqvae2", "run", *settings, *longer, log="vqvae")
    raylets: set[int] = set()  # parents of the workers

    def both_nodes_work() -> bool:
        raylets.update(process.ppid() for process in namespace.find("worker"))
        return job.ended or len(raylets) == 2

    wait_until(both_nodes_work, 200, lambda: job.output)
    assert job.wait().status == 0, job.output
    assert raylets == _raylets(namespace)
    assert project.newest_step("vqvae") == 40


def _raylets(namespace: Namespace) -> set[int]:
    return {process.pid for process in namespace.processes() if process.name() == "raylet"}
