"""Environment of every test: one thread per process, no telemetry, and no connection to servers of the user."""

import os
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from pipeline.process import DEFAULTS

if TYPE_CHECKING:
    from tests.mini_pipeline import MiniPipeline

# Stages that run without the command line have the environment that it sets.
os.environ |= DEFAULTS | {"OMP_NUM_THREADS": "1"}
for name in (
    "RAY_ADDRESS",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_EXPERIMENT_NAME",
    "VQVAE2_FAULT",
    "VQVAE2_RUN",
    "VQVAE2_FRESH",
    "VQVAE2_PARENT_RUN",
    "PYTHONDONTWRITEBYTECODE",  # every command that a test runs would compile all code again
):
    os.environ.pop(name, None)
sys.dont_write_bytecode = False
# A shell script starts background processes with SIGINT ignored, and their children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Ray reads its environment on import: importing this first sets the variables for clusters that tests start.
import stages.runtime.cluster  # noqa: E402, F401

SKIPPED_TESTS: list[str] = []  # although they need no GPU


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note tests that are skipped although they need no GPU. With pytest-xdist, this process has all reports."""
    if report.skipped and "gpu" not in report.keywords:
        SKIPPED_TESTS.append(report.nodeid)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist, which adds the groups to the names of the tests
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests with the marker `gpu` where there is none, and group the tests for several processes.

    A group runs in one process: the tests of a file, which share fixtures, and all tests with the marker `ray`, because
    no two clusters may run at once. That group takes longest, so it comes first.
    """
    for item in items:
        group = "ray" if item.get_closest_marker("ray") else item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_tests:
        import torch

        if not torch.cuda.is_available():
            for item in gpu_tests:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail in continuous integration if a test was skipped for another reason than a missing GPU."""
    if os.environ.get("CI") and SKIPPED_TESTS and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the skipped tests that fail a run of continuous integration."""
    for name in SKIPPED_TESTS if os.environ.get("CI") else ():
        terminalreporter.line(f"SKIPPED IN CI {name}")


@pytest.fixture(scope="session")
def finished_pipeline(tmp_path_factory: pytest.TempPathFactory) -> "MiniPipeline":
    """The artifacts of a small pipeline, built once per process."""
    from tests.mini_pipeline import MiniPipeline, without_ray  # imports torch

    with without_ray():
        return MiniPipeline.build(tmp_path_factory.mktemp("finished"))


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
