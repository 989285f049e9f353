"""Cluster of isolated nodes on one machine, for tests and for benchmarks/faults.py.

Each node is a network namespace on one bridge, with its own mounts; the nodes share only an S3 bucket. The head node
has the project. The other nodes have neither the project nor this code, and their host name resolves to loopback, as on
many systems.
"""

import re
import secrets
import tempfile
from collections.abc import Sequence
from dataclasses import replace

import psutil

from tests.command_line_project import ROOT, CommandLineProject
from tests.namespace import Job, Namespace, wait_until

HEAD = 1  # number of the head node
STORAGE_URL = "s3://bucket/vqvae2"
CREATE_BUCKET = "import boto3; boto3.client('s3').create_bucket(Bucket='bucket')"


def _address(number: int) -> str:
    """Return the IP address of a node."""
    return f"10.77.0.{number}"


class Nodes:
    """Head node and other nodes of a Ray cluster, each with one CPU, and an S3 server on the head node."""

    def __init__(self, namespace: Namespace, project: CommandLineProject, count: int):
        self.namespace = namespace
        self.disconnected: set[int] = set()  # their processes may live on for a while
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
                # A cache of this run only: it holds fault markers, and those of another run would suppress faults.
                "XDG_CACHE_HOME": tempfile.mkdtemp(prefix="cache-of-node-"),
            },
        )
        namespace.shell_line("mount -t tmpfs none /run; mkdir /run/netns")  # `ip` keeps the names of networks there
        namespace.shell_line("ip link add bridge type bridge; ip link set bridge up")
        self._connect(HEAD)
        self.s3_server = self.start(HEAD, "moto_server", "-H", _address(HEAD), "-p", "5000", log="store")
        wait_for(self.s3_server, "Running on")
        create_bucket = self.start(HEAD, "python", "-c", CREATE_BUCKET, log="bucket")
        assert create_bucket.wait(100).status == 0, create_bucket.output
        self._start_ray(HEAD)
        for number in range(HEAD + 1, count + 1):
            self.add(number)

    def add(self, number: int) -> None:
        """Start another node and join it to the cluster."""
        self._connect(number)
        self._start_ray(number)

    def start(self, number: int, *command: str, log: str, **environment: str) -> Job:
        """Start a command on a node, with its output in the log file of that name."""
        project = replace(self.project, environment={**self.project.environment, **environment})
        return self.namespace.start(project, "ip", "netns", "exec", f"node{number}", *command, log=log)

    def run(self, *arguments: str, log: str, **environment: str) -> Job:
        """Start `vqvae2 run` on the head, for workers on all nodes."""
        command = ("vqvae2", "run", *arguments, "-S", f"cluster.storage={STORAGE_URL}")
        return self.start(HEAD, *command, log=log, RAY_ADDRESS=f"{_address(HEAD)}:6379", **environment)

    def disconnect(self, number: int) -> None:
        """Take down a node's network link."""
        self.disconnected.add(number)
        self.namespace.shell_line(f"ip link set veth{number} down")

    def wait_for_checkpoint(self, step: int) -> None:
        """Return once a checkpoint has been uploaded and read back."""
        wait_for(self.s3_server, f"GET [^ ?]*/step-{step:09d}/manifest.json")

    def workers(self) -> dict[int, psutil.Process]:
        """Return the training workers by the number of their node, without the head node and disconnected nodes."""
        by_node = {_node_number(process.parent()): process for process in self.namespace.find("worker")}
        excluded = {HEAD, *self.disconnected}
        return {number: process for number, process in sorted(by_node.items()) if number not in excluded}

    def raylet(self, number: int) -> psutil.Process:
        """Return Ray's node process: killing it is the loss of the node."""
        raylets = [process for process in self.namespace.processes() if process.name() == "raylet"]
        (raylet,) = (process for process in raylets if _node_number(process) == number)
        return raylet

    def _connect(self, number: int) -> None:
        """Create a node's network namespace and link it to the bridge."""
        self.namespace.shell_line(
            f"ip netns add node{number}; ip link add veth{number} type veth peer name net0 netns node{number}; "
            f"ip link set veth{number} master bridge up; ip -n node{number} link set lo up; "
            f"ip -n node{number} addr add {_address(number)}/24 dev net0; ip -n node{number} link set net0 up"
        )

    def _start_ray(self, number: int) -> None:
        role = "--head --port=6379 --include-dashboard=false" if number == HEAD else f"--address={_address(HEAD)}:6379"
        command = (
            f"exec ray start --block {role} --node-ip-address={_address(number)} --num-cpus=1 "
            "--object-store-memory=200000000 --disable-usage-stats"
        )
        if number != HEAD:
            hidden = [tempfile.gettempdir(), *(str(ROOT / package) for package in ("pipeline", "stages", "models"))]
            command = f"cd /; {''.join(f'mount -t tmpfs none {folder}; ' for folder in hidden)} {command}"
        wait_for(self.start(number, "sh", "-c", command, log=f"node{number}"), "Ray runtime started")


def wait_for(job: Job, pattern: str, timeout_s: float = 600) -> None:
    """Return once a command's output matches a pattern. Fails if the command ends without it."""
    wait_until(lambda: job.ended or re.search(pattern, job.output), timeout_s, lambda: job.output)
    assert re.search(pattern, job.output), job.output


def _node_number(raylet: psutil.Process | None) -> int:
    """Return the number of a node from the address in its raylet's command line."""
    arguments: Sequence[str] = raylet.cmdline() if raylet else ()
    match = re.search(rf"--node_ip_address={re.escape(_address(0)[:-1])}(\d+)", " ".join(arguments))
    assert match, arguments
    return int(match[1])
