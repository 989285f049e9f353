"""What every test shares: one thread per process, and programs that neither phone home nor find a user's servers."""

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
for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "VQVAE2_RUN", "VQVAE2_FRESH", "VQVAE2_PARENT_RUN"):
    os.environ.pop(name, None)
# A script starts what is in its background with Ctrl-C ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Ray reads its settings once, when it is first imported: this sets those of a cluster that is started here.
import stages.runtime.cluster  # noqa: E402, F401


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """A test leaves signals to the next as it has found them; what a stranger's handler does shows elsewhere."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    after = [signal.getsignal(number) for number in numbers]
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
    assert after == before
