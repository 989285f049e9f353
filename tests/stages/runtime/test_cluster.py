"""Joining a cluster, or being told at once that there is none."""

import ast
import os
import re
import socket
import subprocess
import sys
import time

import psutil
import pytest
import ray
from ray._private.utils import check_version_info

from stages.config import ClusterConfig
from stages.errors import UserError
from stages.runtime import cluster
from tests.mounts import within


@pytest.mark.parametrize("ours", [False, True])
def test_an_address_where_nobody_listens_is_refused_in_seconds(monkeypatch, ours: bool):
    """Ray would try for minutes; the letter names the address, and what to do about a cluster of ours or another's."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    if ours:
        monkeypatch.setenv(cluster.OURS, "1")
    start = time.monotonic()
    with pytest.raises(UserError, match="does not answer") as error, cluster.connect_cluster(ClusterConfig()):
        pass
    assert time.monotonic() - start < 10
    assert error.value.where == f"RAY_ADDRESS={address}"
    assert ("same command again" if ours else "unset RAY_ADDRESS") in error.value.fix


def test_a_cluster_of_another_version_is_named(monkeypatch):
    """Both versions, of Ray and of Python, which Ray spreads over seven lines."""
    theirs = {"ray_version": "2.49.0", "python_version": "3.12.1"}

    def init(**options: object) -> None:
        check_version_info(theirs, "10.0.0.5")

    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        monkeypatch.delenv(cluster.OURS, raising=False)
        monkeypatch.setattr("ray.init", init)
        with pytest.raises(UserError) as caught, cluster.connect_cluster(ClusterConfig()):
            pass
    told = (
        rf"Version mismatch: The cluster was started with: Ray: 2\.49\.0 Python: 3\.12\.1 .* Ray: {ray.__version__} .*"
    )
    assert re.fullmatch(told, caught.value.what)
    assert (caught.value.where, caught.value.code) == (f"RAY_ADDRESS={address}", 3)
    assert caught.value.fix == "Install the cluster's versions of Ray and Python here, or these there."


@pytest.mark.ray
@pytest.mark.slow
def test_a_container_with_little_shared_memory_is_room_enough():
    """64 MB are what Docker gives: Ray then keeps its objects in files."""
    inside = within("mount -t tmpfs -o size=64m none /dev/shm")
    script = "import shutil, ray; from stages.config import ClusterConfig; from stages.runtime import cluster\n"
    script += "with cluster.connected(ClusterConfig()):\n"
    script += " data = ray.remote(lambda: bytes(100 * 2**20)); print(len(ray.get(data.remote())))\n"
    script += " print(shutil.disk_usage('/dev/shm').total)"
    told = subprocess.run([*inside, sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert told.stdout.split() == [str(100 * 2**20), str(64 * 2**20)]


def test_a_worker_finds_the_interface_of_its_nodes_address(monkeypatch):
    """A host's own name often leads to loopback; what the user has chosen stands."""
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "chosen")
    cluster.name_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "chosen"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    cluster.name_interface()
    found = os.environ.pop("GLOO_SOCKET_IFNAME")
    assert "127.0.0.1" in (address.address for address in psutil.net_if_addrs()[found])


def test_a_storage_that_is_no_url_is_refused():
    """With what to write in its place."""
    with pytest.raises(ValueError, match=r"storage is 'bucket/prefix'; use a URL such as s3://bucket/prefix"):
        ClusterConfig(storage="bucket/prefix")


@pytest.mark.parametrize("set_before", [{}, {"RAY_AUTH_TOKEN_PATH": "/token"}, {"RAY_ADDRESS": "host:6379"}])
def test_a_cluster_of_ours_asks_for_a_token(set_before):
    """One that nobody can guess, unless the user has one; a cluster of the user's is left as it is."""
    code = "import os, stages.runtime.cluster; print([os.environ.get(f'RAY_AUTH_{n}') for n in ('MODE', 'TOKEN')])"
    others = {name: value for name, value in os.environ.items() if not name.startswith("RAY_A")}
    said = [
        ast.literal_eval(subprocess.check_output([sys.executable, "-c", code], text=True, env=others | set_before))
        for _ in range(2)
    ]
    assert [mode for mode, _ in said] == [None if "RAY_ADDRESS" in set_before else "token"] * 2
    if set_before:
        assert [token for _, token in said] == [None, None]
    else:
        assert said[0][1] != said[1][1] and len(said[0][1]) == 64


@pytest.mark.parametrize(
    ("config", "told", "fix"),
    [
        (
            ClusterConfig(workers=9, cpus_per_worker=2),
            r"9 workers need 18 CPUs; the cluster has 16\.",
            "cluster.workers=1",
        ),
        (
            ClusterConfig(cpus_per_worker=32),
            r"1 workers need 32 CPUs; the cluster has 16\.",
            "cluster.cpus_per_worker=1",
        ),
        (ClusterConfig(1, 2, 3), r"1 workers need 3 GPUs; the cluster has 2\.", "cluster=local"),
        (
            ClusterConfig(workers=2, cpus_per_worker=8),
            "2 workers of 8 CPUs are to run; nodes have room for 0",
            "smaller",
        ),
        (ClusterConfig(2, 2, 1), "2 workers of 2 CPUs and 1 GPUs are to run; nodes have room for 1", "fewer"),
        (ClusterConfig(7, 2), "", ""),
        (
            ClusterConfig(workers=53, cpus_per_worker=0.3),
            r"53 workers of 0\.3 CPUs are to run; nodes have room for 52",
            "",
        ),
        (ClusterConfig(52, 0.3), "", ""),
    ],
)
def test_workers_that_no_node_has_room_for_are_refused(monkeypatch, config: ClusterConfig, told: str, fix: str):
    """Ray would wait for a node without end: what counts is what fits on each, and a dead node does not."""
    resources = [{"CPU": 4.0}, {"CPU": 4.0}, {"CPU": 4.0}, {"CPU": 3.9, "GPU": 1.0}, {"CPU": 0.1, "GPU": 1.0}]
    nodes = [{"Alive": True, "Resources": each} for each in resources]
    nodes.append({"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}})
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 16.0, "GPU": 2.0})
    if not told:
        return cluster.check(config)
    with pytest.raises(UserError, match=told) as caught:
        cluster.check(config)
    assert caught.value.where == "params.yaml: cluster" and fix in caught.value.fix and caught.value.code == 3
    return None
