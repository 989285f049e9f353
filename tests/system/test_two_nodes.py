"""The same command on another cluster: two nodes of one core each, found by their address."""

import secrets
from pathlib import Path

import pytest
from projects import SMOKE, Namespace, Project, until

PORT = 6379
NODE = ("--node-ip-address=127.0.0.1", "--num-cpus=1", "--object-store-memory=200000000", "--disable-usage-stats")


@pytest.mark.slow
def test_two_nodes_train_together_and_make_the_same_shards_and_codes(
    first_run: tuple[Project, object], tmp_path: Path, namespace: Namespace
):
    """Each node holds a training worker; what does not depend on the order of sums is equal to the byte."""
    alone = first_run[0]
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    project = alone.copy(tmp_path / "project", DVC_SITE_CACHE_DIR=str(tmp_path / "dvc"), **secret)
    head = ("--head", f"--port={PORT}", "--include-dashboard=false")
    for name, role in (("head", head), ("node", (f"--address=127.0.0.1:{PORT}",))):
        job = namespace.start(project, "ray", "start", "--block", *role, *NODE, log=name)
        until(lambda job=job: "Ray runtime started" in job.output, 100, lambda job=job: job.output)

    there = Project(project.folder, {**project.environment, "RAY_ADDRESS": f"127.0.0.1:{PORT}"})
    on_two = (*SMOKE, "-S", "cluster=local")
    for stage in ("shard", "codes"):
        job = namespace.start(there, "vqvae2", "run", *on_two, "--force", "--only", "--stage", stage, log=stage)
        assert job.wait(200).status == 0, job.output
    assert project.digests("shards", "codes") == alone.digests("shards", "codes")

    longer = ("-S", "train_vqvae.steps=40", "--stage", "vqvae")
    job = namespace.start(there, "vqvae2", "run", *on_two, *longer, log="vqvae")
    nodes: set[int] = set()

    def worked_on() -> bool:
        nodes.update(process.ppid() for process in namespace.find("worker"))
        return job.ended or len(nodes) == 2

    until(worked_on, 200, lambda: job.output)
    assert job.wait().status == 0, job.output
    assert nodes == _raylets(namespace)
    assert project.newest_step("vqvae") == 40


def _raylets(namespace: Namespace) -> set[int]:
    return {process.pid for process in namespace.processes() if process.name() == "raylet"}
