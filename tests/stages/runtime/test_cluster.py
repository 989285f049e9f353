"""Ray clusters: connection errors are reported within seconds, and workers fit on the nodes."""

import ast
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import ray
from ray._private.utils import check_version_info

from stages.cluster_config import ClusterConfig, StageClusterConfig
from stages.errors import UserError
from stages.runtime import capacity, cluster
from tests.mounts import mount_prefix


@pytest.mark.parametrize("is_private", [False, True])
def test_unreachable_cluster_is_reported_within_seconds(monkeypatch, is_private: bool):
    """Ray would try for minutes. The error names the address and the fix for a private and for another cluster."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    if is_private:
        monkeypatch.setenv(cluster.PRIVATE_CLUSTER_VARIABLE, "1")
    start = time.monotonic()
    with pytest.raises(UserError, match="does not answer") as caught, cluster.connect_cluster(ClusterConfig()):
        pass
    assert time.monotonic() - start < 10
    assert caught.value.where == f"RAY_ADDRESS={address}"
    assert ("same command again" if is_private else "unset RAY_ADDRESS") in caught.value.fix


def test_cluster_of_another_version_is_reported():
    """The error has both versions of Ray and of Python in one line, which Ray prints in seven."""
    with pytest.raises(RuntimeError) as mismatch:
        check_version_info({"ray_version": "2.49.0", "python_version": "3.12.1"}, "10.0.0.5")
    error = cluster.connection_error(mismatch.value, "host:6379", is_private=False)
    message = (
        rf"Version mismatch: The cluster was started with: Ray: 2\.49\.0 Python: 3\.12\.1 .* Ray: {ray.__version__} .*"
    )
    assert re.fullmatch(message, error.what)
    assert (error.where, error.code) == ("RAY_ADDRESS=host:6379", 3)
    assert error.fix == "Install the cluster's versions of Ray and Python here, or this machine's versions there."


def test_ray_that_starts_too_slowly_is_explained(tmp_path: Path):
    """Other errors of Ray stay as they are."""
    late = Exception("The current node timed out during startup. This could happen because some of the raylet failed")
    error = cluster.slow_start_error(late, tmp_path)
    assert error is not None and error.code == 3 and "did not start in time" in error.what
    assert cluster.slow_start_error(ValueError("num_cpus must be positive"), tmp_path) is None


def test_start_of_ray_is_waited_for_longer_than_by_ray(monkeypatch):
    """Ray gives up at the first failure to find its node after 30 seconds, and asks again before that."""
    services = ray._private.services
    answers = iter([RuntimeError, RuntimeError, {"node_id": "a"}])

    def late(address, node_id):
        answer = next(answers)
        if answer is RuntimeError:
            raise answer
        return answer

    monkeypatch.setattr(services, "get_node", late)
    monkeypatch.setattr(cluster, "_is_node_alive", lambda: True)
    with cluster._patient_start():
        assert services.get_node("127.0.0.1:6379", "a") == {"node_id": "a"}
    assert services.get_node is late
    answers = iter([RuntimeError] * 3)
    with cluster._patient_start(timeout_s=0), pytest.raises(RuntimeError):
        services.get_node("127.0.0.1:6379", "a")
    monkeypatch.setattr(cluster, "_is_node_alive", lambda: False)
    with cluster._patient_start(), pytest.raises(RuntimeError):  # a process that has ended never registers
        services.get_node("127.0.0.1:6379", "a")


def test_end_of_the_node_process_is_seen(tmp_path: Path):
    """It has no other name in Ray; a child that has ended and was not waited for counts as ended."""
    assert not cluster._is_node_alive()
    program = tmp_path / "raylet"
    program.symlink_to("/bin/sleep")
    child = subprocess.Popen([program, "60"])
    assert cluster._is_node_alive()
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not cluster._is_node_alive()
    child.wait()


def test_agent_ports_are_free_and_different():
    """A port in use is left out."""
    ports = cluster.free_ports(4)
    assert len(set(ports)) == 4 and set(ports) <= set(cluster.AGENT_PORTS)
    with socket.socket() as used:
        used.bind((cluster.LOOPBACK_ADDRESS, ports[0]))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cluster, "AGENT_PORTS", ports)
            assert set(cluster.free_ports(4)) == set(ports[1:])


@pytest.mark.ray
@pytest.mark.slow
def test_private_cluster_starts_with_little_shared_memory():
    """Docker's default is 64 MB. Ray then keeps its objects in files."""
    prefix = mount_prefix("mount -t tmpfs -o size=64m none /dev/shm")
    script = """
import shutil, ray
from stages.config import ClusterConfig
from stages.runtime import capacity, cluster
with cluster.connect_cluster(ClusterConfig()):
    data = ray.remote(lambda: bytes(100 * 2**20))
    print(len(ray.get(data.remote())))
    print(shutil.disk_usage("/dev/shm").total)
"""
    process = subprocess.run([*prefix, sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert process.stdout.split() == [str(100 * 2**20), str(64 * 2**20)]


def test_gloo_uses_the_interface_of_the_nodes_address():
    """A host's own name often resolves to loopback; an interface that the user has set stays."""
    environment = {"GLOO_SOCKET_IFNAME": "chosen"}
    cluster._set_gloo_interface("127.0.0.1", environment)
    assert environment == {"GLOO_SOCKET_IFNAME": "chosen"}
    environment.clear()
    cluster._set_gloo_interface("127.0.0.1", environment)
    (interface,) = environment.values()
    assert "127.0.0.1" in (address.address for address in psutil.net_if_addrs()[interface])


def test_storage_without_a_protocol_is_rejected():
    """The error has an example of a URL."""
    with pytest.raises(ValueError, match=r"storage must be a URL such as s3://bucket/prefix, .* got 'bucket/prefix'"):
        ClusterConfig(storage="bucket/prefix")


@pytest.mark.parametrize("settings", [{}, {"RAY_AUTH_TOKEN_PATH": "/token"}, {"RAY_ADDRESS": "host:6379"}])
def test_private_cluster_requires_a_token(settings: dict[str, str]):
    """The token is random unless the user has one; the settings of an existing cluster stay unchanged."""
    code = "import os, stages.runtime.cluster; print([os.environ.get(f'RAY_AUTH_{n}') for n in ('MODE', 'TOKEN')])"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_A")} | settings
    outputs = [subprocess.check_output([sys.executable, "-c", code], text=True, env=environment) for _ in range(2)]
    modes, tokens = zip(*map(ast.literal_eval, outputs), strict=True)
    assert modes == (None if "RAY_ADDRESS" in settings else "token",) * 2
    if settings:
        assert tokens == (None, None)
    else:
        assert tokens[0] != tokens[1] and len(tokens[0]) == 64


def test_settings_of_a_stage_go_before_those_of_its_kind_and_of_the_cluster():
    """Each setting counts by itself: one that a stage does not have comes from `prior`, then from the cluster."""
    overrides = {"prior": StageClusterConfig(workers=4, max_failures=0), "prior_top": StageClusterConfig(workers=1)}
    config = ClusterConfig(workers=8, gpus_per_worker=1, stages=overrides)
    assert config.for_stage("prior_top") == ClusterConfig(workers=1, gpus_per_worker=1, max_failures=0)
    assert config.for_stage("prior_bottom") == ClusterConfig(workers=4, gpus_per_worker=1, max_failures=0)
    assert config.for_stage("vqvae") == ClusterConfig(workers=8, gpus_per_worker=1)


def test_zero_and_the_empty_text_are_settings_of_a_stage():
    """They are no missing values: a stage without GPUs or storage beside others that have them."""
    override = StageClusterConfig(gpus_per_worker=0, storage="")
    config = ClusterConfig(gpus_per_worker=1, storage="s3://bucket/prefix", stages={"shard": override})
    assert config.for_stage("shard") == ClusterConfig()


def test_private_cluster_has_room_for_the_stage_that_needs_most():
    """All stages of a run share the cluster, and one CPU is left for the processes that only coordinate."""
    stages = {"shard": StageClusterConfig(workers=16, cpus_per_worker=0.5), "sample": StageClusterConfig(workers=1)}
    config = ClusterConfig(workers=2, cpus_per_worker=2, stages=stages)
    assert [capacity.private_cluster_cpus(variant) for variant in config.variants()] == [5, 9, 3]
    assert capacity.private_cluster_cpus(config) == 9


def test_a_range_of_workers_follows_the_processors_of_a_private_cluster(monkeypatch: pytest.MonkeyPatch):
    """Never below the fewest. GPUs are counted when the cluster has started."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(6), raising=False)
    for workers, expected in (((1, 8), 3), ((1, 2), 2), ((4, 8), 4), (5, 5)):
        config = ClusterConfig(workers=workers, cpus_per_worker=2)
        assert (capacity.private_cluster_workers(config), capacity.private_cluster_cpus(config)) == (
            expected,
            1 + 2 * expected,
        )
    assert capacity.private_cluster_workers(ClusterConfig((1, 8), 2, 1)) == 8


@pytest.mark.parametrize(
    ("config", "message", "fix"),
    [
        (
            ClusterConfig(workers=9, cpus_per_worker=2),
            r"9 workers need 18 CPUs; the cluster has 16\.",
            "cluster.workers=1",
        ),
        (
            ClusterConfig(cpus_per_worker=32),
            r"1 worker needs 32 CPUs; the cluster has 16\.",
            "cluster.cpus_per_worker=1",
        ),
        (ClusterConfig(1, 2, 3), r"1 worker needs 3 GPUs; the cluster has 2\.", "cluster=local"),
        (
            ClusterConfig(workers=2, cpus_per_worker=8),
            "2 workers need 8 CPUs each; the nodes have room for 0",
            "Lower cluster.workers",
        ),
        (
            ClusterConfig(2, 2, 1),
            "2 workers need 2 CPUs and 1 GPUs each; the nodes have room for 1",
            "Lower cluster.workers",
        ),
        (ClusterConfig(7, 2), "", ""),
        (
            ClusterConfig(workers=53, cpus_per_worker=0.3),
            r"53 workers need 0\.3 CPUs each; the nodes have room for 52",
            "",
        ),
        (ClusterConfig(52, 0.3), "", ""),
        (ClusterConfig((7, 99), 2), "", ""),
        (ClusterConfig((9, 99), 2), r"At least 9 workers need 18 CPUs; the cluster has 16\.", "cluster.workers=1"),
    ],
)
def test_workers_that_do_not_fit_are_rejected(config: ClusterConfig, message: str, fix: str):
    """Ray would wait without end. A worker must fit on one node, and dead nodes do not count."""
    resources = [{"CPU": 4.0}, {"CPU": 4.0}, {"CPU": 4.0}, {"CPU": 3.9, "GPU": 1.0}, {"CPU": 0.1, "GPU": 1.0}]
    nodes = [{"Alive": True, "Resources": node_resources} for node_resources in resources]
    nodes.append({"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}})
    total = {"CPU": 16.0, "GPU": 2.0}
    if not message:
        return capacity.check_capacity(config, total, nodes)
    with pytest.raises(UserError, match=message) as caught:
        capacity.check_capacity(config, total, nodes)
    assert caught.value.where == "params.yaml: cluster" and fix in caught.value.fix and caught.value.code == 3
    return None
