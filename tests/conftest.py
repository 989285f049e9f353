"""Environment of every test: one thread per process, no telemetry, and no connection to servers of the user."""

import os
import signal
from collections.abc import Iterator

import pytest

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "DVC_NO_ANALYTICS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
}
for name in (
    "RAY_ADDRESS",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_EXPERIMENT_NAME",
    "VQVAE2_FAULT",
    "VQVAE2_RUN",
    "VQVAE2_FRESH",
    "VQVAE2_PARENT_RUN",
):
    os.environ.pop(name, None)
# A shell script starts background processes with SIGINT ignored, and their children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Ray reads its environment on import: importing this first sets the variables for clusters that tests start.
import stages.runtime.cluster  # noqa: E402, F401


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """Restore signal handlers after each test, and fail a test that leaves other handlers."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    after = [signal.getsignal(number) for number in numbers]
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
    assert after == before
