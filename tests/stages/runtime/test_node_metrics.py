"""Tests of the metrics of a cluster's nodes."""

import http.server
import socket
import threading
from collections.abc import Iterator

import pytest

from stages.runtime import node_metrics
from stages.runtime.node_metrics import NodeMetrics, collect, node_names, read_gauges
from tests.namespace import wait_until

PAGE = """# HELP ray_node_cpu_utilization Total CPU usage on a ray node
# TYPE ray_node_cpu_utilization gauge
ray_node_cpu_utilization{SessionName="s",ip="10.0.0.1"} 41.5
# HELP ray_node_mem_used Memory usage on a ray node
# TYPE ray_node_mem_used gauge
ray_node_mem_used{ip="10.0.0.1"} 2.5e+09
# HELP ray_node_gpus_utilization The GPU utilization
# TYPE ray_node_gpus_utilization gauge
ray_node_gpus_utilization{GpuDeviceName="H100",GpuIndex="0",ip="10.0.0.1"} 97.0
ray_node_gpus_utilization{GpuDeviceName="H100",GpuIndex="1",ip="10.0.0.1"} 12.0
ray_node_gram_used{GpuDeviceName="H100",GpuIndex="1",ip="10.0.0.1"} 70000.0
ray_node_disk_io_read{ip="10.0.0.1"} 1.0
"""


def node(host: str, address: str, number: int, port: int = 0) -> dict:
    return {
        "NodeManagerHostname": host,
        "NodeManagerAddress": address,
        "NodeID": f"{number:08d}more",
        "MetricsExportPort": port,
    }


@pytest.fixture
def port() -> Iterator[int]:
    """The port of a server that answers with PAGE."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(PAGE.encode())

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_gauges_of_processors_memory_and_each_gpu_are_read():
    """Names and units are those of MLflow's system metrics."""
    assert read_gauges(PAGE) == {
        "cpu_utilization_percentage": 41.5,
        "system_memory_usage_megabytes": 2500.0,
        "gpu_0_utilization_percentage": 97.0,
        "gpu_1_utilization_percentage": 12.0,
        "gpu_1_memory_usage_megabytes": 70000.0,
    }


def test_a_node_that_does_not_answer_is_left_out(port: int, monkeypatch):
    """The metrics of the others are prefixed by their node; proxies of the environment are not asked."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        lost = node("gpu-2", "127.0.0.1", 2, silent.getsockname()[1])
        values = collect([node("gpu-1", "127.0.0.1", 1, port), lost], timeout_s=0.2)
    assert values["gpu-1/gpu_1_memory_usage_megabytes"] == 70000.0 and len(values) == 5


@pytest.mark.parametrize(
    ("nodes", "names"),
    [
        ([node("a", "10.0.0.1", 1), node("b", "10.0.0.2", 2)], ["a", "b"]),
        ([node("localhost", "10.0.0.1", 1), node("localhost", "10.0.0.2", 2)], ["10.0.0.1", "10.0.0.2"]),
        ([node("a", "127.0.0.1", 1), node("a", "127.0.0.1", 2)], ["00000001", "00000002"]),
        ([node("10.0.0.1", "10.0.0.1", 1), node("b", "10.0.0.2", 2)], ["00000001", "b"]),
    ],
)
def test_every_node_has_its_own_name(nodes: list, names: list):
    """Containers may all have one host name."""
    assert node_names(nodes) == names


def test_a_slow_cluster_delays_no_caller():
    """Values arrive with a later call; an error gives none."""
    release = threading.Event()
    slow = NodeMetrics(lambda: {"a/cpu": 1.0} if release.wait(10) else {})
    assert slow.take() == {} == slow.take()
    release.set()
    wait_until(lambda: slow._values, 10)
    assert slow.take() == {"a/cpu": 1.0}
    failing = NodeMetrics(lambda: {}["absent"])
    assert failing.take() == {}


def test_a_process_without_a_cluster_has_no_node_metrics():
    """The private cluster of one machine has none either: MLflow's monitors measure this machine."""
    assert node_metrics.collect_from_cluster() == {}
