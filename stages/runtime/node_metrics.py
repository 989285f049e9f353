"""Load of every node of a given cluster, from the Prometheus page that Ray's agent serves on each node.

Ray measures processors, memory and GPUs of its nodes anyway, so no process of ours runs on them for that.
"""

import sys
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

FETCH_TIMEOUT_S = 3.0  # per node

# Ray's gauge -> name of the metric as in MLflow's own system metrics, with the index of the GPU, and factor.
GAUGES = {
    "ray_node_cpu_utilization": ("cpu_utilization_percentage", 1.0),
    "ray_node_mem_used": ("system_memory_usage_megabytes", 1e-6),
    "ray_node_mem_total": ("system_memory_total_megabytes", 1e-6),
    "ray_node_gpus_utilization": ("gpu_{gpu}_utilization_percentage", 1.0),
    "ray_node_gram_used": ("gpu_{gpu}_memory_usage_megabytes", 1.0),
}
GPU_LABEL = "GpuIndex"


class NodeMetrics:
    """Metrics of all nodes, collected in the background: a node that does not answer delays no caller."""

    def __init__(self, collect: Callable[[], dict[str, float]] | None = None):
        self._collect = collect or collect_from_cluster
        self._thread: threading.Thread | None = None
        self._values: dict[str, float] = {}

    def take(self) -> dict[str, float]:
        """Return what was collected since the last call, and start to collect again."""
        if self._thread and self._thread.is_alive():
            return {}
        values, self._values = self._values, {}
        self._thread = threading.Thread(target=self._run, name="node-metrics", daemon=True)
        self._thread.start()
        return values

    def _run(self) -> None:
        with suppress(Exception):  # the cluster may end at any time, and metrics are no reason to fail
            self._values = self._collect()


def collect_from_cluster() -> dict[str, float]:
    """Return the metrics of the nodes of the cluster that this process is connected to; none if it has one node."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return {}
    nodes = [node for node in ray.nodes() if node["Alive"]]
    return collect(nodes) if len(nodes) > 1 else {}


def collect(nodes: Sequence[Mapping[str, Any]], timeout_s: float = FETCH_TIMEOUT_S) -> dict[str, float]:
    """Return NODE/METRIC -> value of nodes as Ray lists them, without those that do not answer."""
    values: dict[str, float] = {}
    for name, node in zip(node_names(nodes), nodes, strict=True):
        address = node["NodeManagerAddress"]
        host = f"[{address}]" if ":" in address else address
        # A proxy of the environment does not reach the nodes.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with suppress(OSError, ValueError):
            with opener.open(f"http://{host}:{node['MetricsExportPort']}/metrics", timeout=timeout_s) as answer:
                page = answer.read().decode()
            values |= {f"{name}/{metric}": value for metric, value in read_gauges(page).items()}
    return values


def node_names(nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name each node by its host name; by its address, or by its id, if others have the same."""
    candidates = [
        (str(node["NodeManagerHostname"]), str(node["NodeManagerAddress"]), str(node["NodeID"])[:8]) for node in nodes
    ]
    counts = Counter(name for names in candidates for name in names)
    return [next((name for name in names if counts[name] == 1), names[-1]) for names in candidates]


def read_gauges(page: str) -> dict[str, float]:
    """Return the metrics on a Prometheus page that GAUGES lists."""
    from prometheus_client.parser import text_string_to_metric_families

    values = {}
    gauges = "\n".join(line for line in page.splitlines() if line.startswith(tuple(GAUGES)))  # of some thousand lines
    for family in text_string_to_metric_families(gauges):
        for sample in family.samples:
            if sample.name in GAUGES:
                name, factor = GAUGES[sample.name]
                values[name.format(gpu=sample.labels.get(GPU_LABEL, 0))] = factor * sample.value
    return values
