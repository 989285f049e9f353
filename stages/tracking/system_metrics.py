"""System metrics: load of processors, memory, disk, network and GPUs, under the names that MLflow gives them.

    system/cpu_utilization_percentage          this machine
    system/NODE/cpu_utilization_percentage     a node of a cluster of several, measured by Ray

MLflow's own monitors read the same numbers from psutil. Importing them imports MLflow, which takes seconds, and a stage
of `vqvae2 run` needs nothing else of it. Only its monitor of GPUs is used, where NVIDIA's library is installed.
"""

import importlib.util
import os
import time
from contextlib import suppress
from typing import Any

import psutil

from stages.runtime.node_metrics import NodeMetrics
from stages.tracking.journal import SYSTEM_PREFIX, Journal, read_points

SAMPLE_INTERVAL_S = 10.0
MEGABYTE = 1e6


class SystemMetrics:
    """Sampler that writes system metrics to a journal. Its steps continue those already in the journal."""

    def __init__(self, journal: Journal):
        self._journal = journal
        self._gpu_monitor = _gpu_monitor()
        self._node_metrics = NodeMetrics()
        self._network = psutil.net_io_counters()  # since the machine was booted
        psutil.cpu_percent()  # the next call returns the load since this one
        last_steps = [max(curve) for name, curve in read_points(journal.path).items() if name.startswith(SYSTEM_PREFIX)]
        self._step = 1 + max(last_steps, default=-1)
        self._next_sample = time.monotonic() + SAMPLE_INTERVAL_S

    def sample(self) -> None:
        """Write one sample to the journal, unless the last one is less than SAMPLE_INTERVAL_S old."""
        if time.monotonic() < self._next_sample:
            return
        self._next_sample = time.monotonic() + SAMPLE_INTERVAL_S
        values = self._measure()
        if self._gpu_monitor:
            self._gpu_monitor.collect_metrics()
            values |= self._gpu_monitor.aggregate_metrics()
            self._gpu_monitor.clear_metrics()
        values |= self._node_metrics.take()
        self._journal.metrics({SYSTEM_PREFIX + name: float(value) for name, value in values.items()}, self._step)
        self._step += 1

    def _measure(self) -> dict[str, float]:
        memory, disk, network = psutil.virtual_memory(), psutil.disk_usage(os.sep), psutil.net_io_counters()
        return {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": round(memory.used / MEGABYTE, 1),
            "system_memory_usage_percentage": round(100 * memory.used / memory.total, 1),
            "disk_usage_percentage": disk.percent,
            "disk_usage_megabytes": round(disk.used / MEGABYTE, 1),
            "disk_available_megabytes": round(disk.free / MEGABYTE, 1),
            "network_receive_megabytes": (network.bytes_recv - self._network.bytes_recv) / MEGABYTE,
            "network_transmit_megabytes": (network.bytes_sent - self._network.bytes_sent) / MEGABYTE,
        }


def _gpu_monitor() -> Any:
    """Return MLflow's monitor of GPUs; None without a GPU or nvidia-ml-py."""
    if importlib.util.find_spec("pynvml"):
        with suppress(Exception):
            from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

            return GPUMonitor()
    return None
