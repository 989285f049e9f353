"""System metrics: load of processors, memory, disk, network and GPUs, measured by MLflow's monitors."""

import time
from contextlib import suppress

from stages.tracking.journal import SYSTEM_PREFIX, Journal, read_points

SAMPLE_INTERVAL_S = 10.0


class SystemMetrics:
    """Sampler that writes system metrics to a journal. Its steps continue those already in the journal."""

    def __init__(self, journal: Journal):
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self._journal = journal
        self._monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with suppress(Exception):  # no GPU, or nvidia-ml-py is not installed
            self._monitors.append(GPUMonitor())
        last_steps = [max(curve) for name, curve in read_points(journal.path).items() if name.startswith(SYSTEM_PREFIX)]
        self._step = 1 + max(last_steps, default=-1)
        self._next_sample = time.monotonic() + SAMPLE_INTERVAL_S

    def sample(self) -> None:
        """Write one sample to the journal, unless the last one is less than SAMPLE_INTERVAL_S old."""
        if time.monotonic() < self._next_sample:
            return
        self._next_sample = time.monotonic() + SAMPLE_INTERVAL_S
        values: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            values |= {SYSTEM_PREFIX + name: float(value) for name, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        self._journal.metrics(values, self._step)
        self._step += 1
