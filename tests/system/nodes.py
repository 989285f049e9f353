"""Nodes with networks and disks of their own, on one machine, which share an S3 bucket and nothing else.

Each is a network namespace on one bridge. The head sees the project; the others see neither it nor this code, and their
name resolves to loopback, as on many systems. Used by the tests beside it and by benchmarks/faults.py.
"""

import re
import secrets
import tempfile
from collections.abc import Sequence
from dataclasses import replace

import psutil
from projects import ROOT, Job, Namespace, Project, until

HEAD = 1
STORE = "s3://bucket/vqvae2"
BUCKET = "import boto3; boto3.client('s3').create_bucket(Bucket='bucket')"


def _address(number: int) -> str:
    return f"10.77.0.{number}"


class Nodes:
    """A head and others, as they would lie in a data centre; each has one CPU."""

    def __init__(self, namespace: Namespace, project: Project, count: int):
        self.namespace = namespace
        self.alone: set[int] = set()  # nodes without a cable: what runs there may live on for a while
        self.project = replace(
            project,
            environment={
                **project.environment,
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN": secrets.token_hex(32),
                "AWS_ENDPOINT_URL": f"http://{_address(HEAD)}:5000",
                "AWS_ACCESS_KEY_ID": "test",
                "AWS_SECRET_ACCESS_KEY": "test",
                "AWS_DEFAULT_REGION": "us-east-1",
                # Of its own: the markers of faults lie there, and those of another run would keep faults away.
                "XDG_CACHE_HOME": tempfile.mkdtemp(prefix="cache-of-node-"),
            },
        )
        namespace.say("mount -t tmpfs none /run; mkdir /run/netns")  # where `ip` keeps the names of networks
        namespace.say("ip link add bridge type bridge; ip link set bridge up")
        self._connect(HEAD)
        self.store = self.start(HEAD, "moto_server", "-H", _address(HEAD), "-p", "5000", log="store")
        wait_for(self.store, "Running on")
        bucket = self.start(HEAD, "python", "-c", BUCKET, log="bucket")
        assert bucket.wait(100).status == 0, bucket.output
        self._start_ray(HEAD)
        for number in range(HEAD + 1, count + 1):
            self.add(number)

    def add(self, number: int) -> None:
        """Have another node join."""
        self._connect(number)
        self._start_ray(number)

    def start(self, number: int, *command: str, log: str, **environment: str) -> Job:
        """Start a command on a node."""
        project = replace(self.project, environment={**self.project.environment, **environment})
        return self.namespace.start(project, "ip", "netns", "exec", f"node{number}", *command, log=log)

    def run(self, *arguments: str, log: str, **environment: str) -> Job:
        """Start `vqvae2 run` on the head, for workers on all nodes."""
        words = ("vqvae2", "run", *arguments, "-S", f"cluster.storage={STORE}")
        return self.start(HEAD, *words, log=log, RAY_ADDRESS=f"{_address(HEAD)}:6379", **environment)

    def cut(self, number: int) -> None:
        """Pull a node's cable."""
        self.alone.add(number)
        self.namespace.say(f"ip link set veth{number} down")

    def wait_for_checkpoint(self, step: int) -> None:
        """Return once a checkpoint has arrived in the store, and has been read back."""
        wait_for(self.store, f"GET [^ ?]*/step-{step:09d}/manifest.json")

    def workers(self) -> dict[int, psutil.Process]:
        """Find the training workers on other nodes than the head that can be reached, by the number of their node."""
        found = {_node(process.parent()): process for process in self.namespace.find("worker")}
        return {number: process for number, process in sorted(found.items()) if number not in {HEAD, *self.alone}}

    def raylet(self, number: int) -> psutil.Process:
        """Find the process that makes a node one of the cluster's."""
        raylets = [process for process in self.namespace.processes() if process.name() == "raylet"]
        (found,) = (process for process in raylets if _node(process) == number)
        return found

    def _connect(self, number: int) -> None:
        self.namespace.say(
            f"ip netns add node{number}; ip link add veth{number} type veth peer name net0 netns node{number}; "
            f"ip link set veth{number} master bridge up; ip -n node{number} link set lo up; "
            f"ip -n node{number} addr add {_address(number)}/24 dev net0; ip -n node{number} link set net0 up"
        )

    def _start_ray(self, number: int) -> None:
        role = "--head --port=6379 --include-dashboard=false" if number == HEAD else f"--address={_address(HEAD)}:6379"
        start = (
            f"exec ray start --block {role} --node-ip-address={_address(number)} --num-cpus=1 "
            "--object-store-memory=200000000 --disable-usage-stats"
        )
        if number != HEAD:
            hidden = [tempfile.gettempdir(), *(str(ROOT / package) for package in ("pipeline", "stages", "models"))]
            start = f"cd /; {''.join(f'mount -t tmpfs none {folder}; ' for folder in hidden)} {start}"
        wait_for(self.start(number, "sh", "-c", start, log=f"node{number}"), "Ray runtime started")


def wait_for(job: Job, pattern: str, seconds: float = 600) -> None:
    """Return once a command has said something."""
    until(lambda: job.ended or re.search(pattern, job.output), seconds, lambda: job.output)
    assert re.search(pattern, job.output), job.output


def _node(raylet: psutil.Process | None) -> int:
    """Number a node by the address that its raylet was given."""
    words: Sequence[str] = raylet.cmdline() if raylet else ()
    found = re.search(rf"--node_ip_address={re.escape(_address(0)[:-1])}(\d+)", " ".join(words))
    assert found, words
    return int(found[1])
