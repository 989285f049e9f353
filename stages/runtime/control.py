"""Control actor: a Ray actor through which workers and the process that started them exchange messages.

It carries reports, stop requests, fatal errors and heartbeats, so the nodes need no shared disk. It runs on the node of
the process that started it, because the loss of another node must not take it away.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from stages.errors import UserError
from stages.runtime.context import Reporter

T = TypeVar("T")

POLL_INTERVAL_S = 0.5  # between two looks for new reports
SHUTDOWN_TIMEOUT_S = 15.0  # for the last reports: a dead cluster may never answer


class ControlActor:
    """Message board of one stage's workers. `start_control_actor` starts it as a Ray actor.

    The methods are coroutines of one event loop, so `wait_for_stop` and `wait_for_save` block no other call.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock  # seconds
        self._reports: list[tuple[str, tuple[Any, ...]]] = []
        self._stop_requested, self._saved = asyncio.Event(), asyncio.Event()
        self._fatal_error: UserError | None = None
        self._failures = 0
        self._workers = 0
        self._last_heartbeat: dict[Hashable, float] = {}  # time by worker
        self._last_check = clock()

    async def report(self, method: str, *arguments: Any) -> None:
        """Queue a call of a `Reporter` method."""
        self._reports.append((method, arguments))

    async def take_reports(self) -> list[tuple[str, tuple[Any, ...]]]:
        """Return the queued reports and empty the queue."""
        reports, self._reports = self._reports, []
        return reports

    async def request_stop(self) -> None:
        """Ask the workers to save and stop."""
        self._stop_requested.set()

    async def wait_for_stop(self) -> None:
        """Return once `request_stop` was called."""
        await self._stop_requested.wait()

    async def mark_saved(self) -> None:
        """Record that the workers have saved after a stop request."""
        self._saved.set()

    async def wait_for_save(self) -> None:
        """Return once `mark_saved` was called."""
        await self._saved.wait()

    async def set_fatal_error(self, error: UserError) -> None:
        """Record an error that a retry cannot fix. The first one stays."""
        self._fatal_error = self._fatal_error or error

    async def count_failure(self, is_preemption: bool = False) -> int:
        """Count a loss or an error of workers that ends an attempt to train; return the number so far.

        The loss of a preempted node is no failure.
        """
        self._failures += not is_preemption
        return self._failures

    async def set_workers(self, workers: int) -> int:
        """Record the number of workers of an attempt to train; return that of the attempt before, 0 for the first."""
        previous, self._workers = self._workers, workers
        return previous

    async def get_fatal_error(self) -> UserError | None:
        """Return the recorded fatal error, or None."""
        return self._fatal_error

    async def heartbeat(self, worker: Hashable) -> None:
        """Record a heartbeat of a worker."""
        self._last_heartbeat[worker] = self._clock()

    async def stale_workers(self, timeout_s: float) -> list[Hashable]:
        """Return the workers without a heartbeat for `timeout_s`. Each is returned again only after another timeout.

        Call it much more often than every `timeout_s`: a long gap between two calls restarts all timers.
        """
        now = self._clock()
        # A long gap means that the caller or this actor was paused, as on a frozen machine. Then the workers were
        # probably paused as well, and their missing heartbeats prove nothing.
        if now - self._last_check > 0.75 * timeout_s:
            self._last_heartbeat = dict.fromkeys(self._last_heartbeat, now)
        self._last_check = now
        stale = [worker for worker, last in self._last_heartbeat.items() if now - last > timeout_s]
        self._last_heartbeat |= dict.fromkeys(stale, now)
        return stale

    async def unregister(self, worker: Hashable) -> None:
        """Stop watching a worker that has ended."""
        self._last_heartbeat.pop(worker, None)


class RemoteReporter(Reporter):
    """Reporter of a worker: sends every call to the control actor."""

    def __init__(self, control: Any):
        self.control = control

    def _report(self, *report: Any) -> None:
        import ray

        ray.get(self.control.report.remote(*report))

    def progress(self, done: float, total: float, unit: str, numbers: Mapping[str, float]) -> None:
        self._report("progress", done, total, unit, dict(numbers))

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self._report("metrics", dict(values), step)

    def image(self, name: str, png: bytes, step: int) -> None:
        self._report("image", name, png, step)

    def message(self, text: str) -> None:
        self._report("message", text)


def start_control_actor() -> Any:
    """Start a control actor on this node and return its handle, which can be sent to any node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(ControlActor).options(num_cpus=0, scheduling_strategy=this_node).remote()


def stop_requested(control: Any) -> Callable[[], bool]:
    """Return a function that tells whether a stop was requested.

    It is cheap enough for every training step: one pending call waits for the stop, and each check only looks at it.
    """
    import ray

    pending_stop = control.wait_for_stop.remote()
    return lambda: bool(ray.wait([pending_stop], timeout=0)[0])


def start_in_thread(call: Callable[[], T], name: str) -> "Future[T]":
    """Call in a daemon thread, so that the main thread can handle signals and the process can exit."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name=name, daemon=True).start()
    return future


@contextmanager
def background_thread(
    target: Callable[[threading.Event], None], name: str, join_timeout_s: float | None = None
) -> Iterator[None]:
    """Run `target` in a thread for the length of the block.

    When the block ends, the event given to `target` is set and the thread is joined, for up to `join_timeout_s`.
    """
    block_ended = threading.Event()
    thread = threading.Thread(target=target, args=(block_ended,), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        block_ended.set()
        thread.join(join_timeout_s)


@contextmanager
def forward_reports(control: Any, reporter: Reporter) -> Iterator[None]:
    """Pass the workers' reports from the control actor to `reporter` during the block.

    The last reports are passed on when the block ends.
    """
    import ray

    def forward(block_ended: threading.Event) -> None:
        while True:
            is_last_pass = block_ended.is_set()
            try:
                reports = ray.get(control.take_reports.remote())
            except ray.exceptions.RayError:  # the cluster is gone; training raises the error
                return
            for method, arguments in reports:
                getattr(reporter, method)(*arguments)
            if is_last_pass:
                return
            block_ended.wait(POLL_INTERVAL_S)

    with background_thread(forward, "forward-reports", SHUTDOWN_TIMEOUT_S):
        yield


@contextmanager
def fail_without_retry(control: Any) -> Iterator[None]:
    """Record a UserError of the block as fatal, and raise it again at once in every later attempt.

    Ray Train retries every failure. It cannot tell an error that only the user can fix from a lost worker.
    """
    import ray

    if fatal_error := ray.get(control.get_fatal_error.remote()):
        raise fatal_error
    try:
        yield
    except UserError as error:
        with suppress(ray.exceptions.RayError):
            ray.get(control.set_fatal_error.remote(error.with_traceback(None)))
        raise
