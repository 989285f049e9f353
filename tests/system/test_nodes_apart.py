"""Hosts with networks and disks of their own, which share an S3 bucket and nothing else.

Each node is a network namespace on one bridge. The head sees the project; the others see neither it nor this code,
and their name resolves to loopback, as on many systems.
"""

import re
import secrets
import signal
import tempfile
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from projects import ROOT, SMOKE, Job, Namespace, Project, until

HEAD, STORE = "10.77.0.1", "http://10.77.0.1:5000"
STEPS = 60
SETTINGS = (
    *(*SMOKE, "-S", "cluster=local", "-S", "cluster.max_failures=8"),
    *("-S", f"train_vqvae.steps={STEPS}", "-S", "train_vqvae.checkpoint_every=10", "-S", "train_vqvae.log_every=5"),
)
BUCKET = "import boto3; boto3.client('s3').create_bucket(Bucket='bucket')"


class Nodes:
    """A head and others, as they would lie in a data centre."""

    def __init__(self, namespace: Namespace, project: Project, count: int):
        self.namespace, self.project = namespace, project
        namespace._say("mount -t tmpfs none /run; mkdir /run/netns")  # where `ip` keeps the names of networks
        namespace._say("ip link add bridge type bridge; ip link set bridge up")
        for number in range(1, count + 1):
            namespace._say(
                f"ip netns add node{number}; ip link add veth{number} type veth peer name net0 netns node{number}; "
                f"ip link set veth{number} master bridge up; ip -n node{number} link set lo up; "
                f"ip -n node{number} addr add 10.77.0.{number}/24 dev net0; ip -n node{number} link set net0 up"
            )
        self.store = self.start(1, "moto_server", "-H", HEAD, "-p", "5000", log="store")
        self.store.wait_for("Running on")
        bucket = self.start(1, "python", "-c", BUCKET, log="bucket")
        assert bucket.job.wait(100).status == 0, bucket.job.output
        self.ray = {number: self._ray(number) for number in range(1, count + 1)}

    def start(self, number: int, *command: str, log: str) -> "OnNode":
        """Start a command on a node."""
        inside = ("ip", "netns", "exec", f"node{number}", *command)
        return OnNode(self.namespace.start(self.project, *inside, log=log))

    def cut(self, number: int) -> None:
        """Pull a node's cable."""
        self.namespace._say(f"ip link set veth{number} down")

    def wait_for_checkpoint(self, step: int) -> None:
        """Return once a checkpoint has arrived in the store, and has been read back."""
        self.store.wait_for(f"GET [^ ]*/step-{step:09d}/manifest.json")

    def _ray(self, number: int) -> "OnNode":
        role = "--head --port=6379 --include-dashboard=false" if number == 1 else f"--address={HEAD}:6379"
        start = (
            f"exec ray start --block {role} --node-ip-address=10.77.0.{number} --num-cpus=1 "
            "--object-store-memory=200000000 --disable-usage-stats"
        )
        if number > 1:
            hidden = [tempfile.gettempdir(), *(str(ROOT / package) for package in ("pipeline", "stages", "models"))]
            start = f"cd /; {''.join(f'mount -t tmpfs none {folder}; ' for folder in hidden)} {start}"
        started = self.start(number, "sh", "-c", start, log=f"node{number}")
        started.wait_for("Ray runtime started")
        return started


class OnNode:
    """A command on a node."""

    def __init__(self, job: Job):
        self.job = job

    def wait_for(self, pattern: str, seconds: float = 300) -> None:
        """Return once it has said something."""
        job = self.job
        until(lambda: job.ended or re.search(pattern, job.output), seconds, lambda: job.output)
        assert re.search(pattern, job.output), job.output


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
    environment = {
        "DVC_SITE_CACHE_DIR": str(tmp_path / "dvc"),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "AWS_ENDPOINT_URL": STORE,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "XDG_CACHE_HOME": str(Path(tempfile.gettempdir(), "cache-of-node")),
    }
    project = sharded.copy(tmp_path / "project", **environment)
    nodes = Nodes(namespace, project, 4)
    nodes.project = replace(project, environment={**environment, "RAY_ADDRESS": f"{HEAD}:6379", "VQVAE2_FAULT": faults})
    command = ("vqvae2", "run", *SETTINGS, "-S", "cluster.storage=s3://bucket/vqvae2", "--stage", "vqvae")
    run = nodes.start(1, *command, log="run")

    run.wait_for("Resuming at step 10 of", 600)
    nodes.wait_for_checkpoint(20)
    _raylet(namespace, _working(namespace)[0]).send_signal(signal.SIGKILL)
    run.wait_for("Resuming at step 20 of", 600)
    nodes.wait_for_checkpoint(40)
    nodes.cut(_working(namespace)[0])
    run.wait_for("Resuming at step 40 of", 600)
    done = run.job.wait(600)
    assert done.status == 0, done.output
    assert project.digests("vqvae") == alone.digests("vqvae")


def _working(namespace: Namespace) -> list[int]:
    """Number the nodes other than the head on which a training worker is."""
    found = {_node(process) for process in namespace.find("worker")} - {1}
    return sorted(found)


def _node(process: psutil.Process) -> int:
    """Number the node of a worker, by the address its raylet was given."""
    parent = process.parent()
    assert parent is not None
    match = re.search(r"--node_ip_address=10\.77\.0\.(\d+)", " ".join(parent.cmdline()))
    assert match, parent.cmdline()
    return int(match[1])


def _raylet(namespace: Namespace, number: int) -> psutil.Process:
    sign = f"--node_ip_address=10.77.0.{number}"
    (found,) = (one for one in namespace.processes() if one.name() == "raylet" and sign in one.cmdline())
    return found
