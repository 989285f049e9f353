"""Where workers and the process that started them leave word for one another, whatever disks they share.

It is an actor of Ray on the node of that process: no other node's end takes it away.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from stages.errors import UserError
from stages.runtime.context import Reporter

POLL_INTERVAL_S = 0.5
PATIENCE_SECONDS = 15.0  # with a cluster that may be gone


class ControlActor:
    """The actor. Each method is one message; `open_desk` starts one."""

    def __init__(self) -> None:
        self._reports: list[tuple[str, tuple[Any, ...]]] = []
        self._stop, self._saved = asyncio.Event(), asyncio.Event()
        self._refusal: UserError | None = None
        self._signs: dict[Hashable, float] = {}
        self._asked = time.monotonic()

    async def report(self, method: str, *arguments: Any) -> None:
        """Leave a call of a `Reporter`'s method."""
        self._reports.append((method, arguments))

    async def take_reports(self) -> list[tuple[str, tuple[Any, ...]]]:
        """Take what was reported since the last time."""
        taken, self._reports = self._reports, []
        return taken

    async def stop(self) -> None:
        """Ask the workers to save and end."""
        self._stop.set()

    async def stopping(self) -> None:
        """Answer only once somebody asks the workers to stop."""
        await self._stop.wait()

    async def saved(self) -> None:
        """Say that what was asked to stop has saved its state."""
        self._saved.set()

    async def saving(self) -> None:
        """Answer only once that is so."""
        await self._saved.wait()

    async def refuse(self, error: UserError) -> None:
        """Say why trying again is of no use."""
        self._refusal = self._refusal or error

    async def refusal(self) -> UserError | None:
        """Tell what was refused."""
        return self._refusal

    async def sign(self, process: Hashable) -> None:
        """Leave a sign of life."""
        self._signs[process] = time.monotonic()

    async def silent(self, seconds: float) -> list[Hashable]:
        """Name who left one, and none for that long since; each again after as long."""
        now = time.monotonic()
        if now - self._asked > 0.75 * seconds:  # whoever asks, or this desk, stood still too: so may all others have
            self._signs = dict.fromkeys(self._signs, now)
        self._asked = now
        found = [process for process, at in self._signs.items() if now - at > seconds]
        self._signs |= dict.fromkeys(found, now)
        return found

    async def forget(self, process: Hashable) -> None:
        """Name a process no more: it has ended."""
        self._signs.pop(process, None)


class RemoteReporter(Reporter):
    """Hands what a worker reports to the process that started the workers."""

    def __init__(self, desk: Any):
        self.desk = desk

    def _report(self, *report: Any) -> None:
        import ray

        ray.get(self.desk.report.remote(*report))

    def progress(self, done: float, total: float, unit: str, numbers: Mapping[str, float]) -> None:
        self._report("progress", done, total, unit, dict(numbers))

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self._report("metrics", dict(values), step)

    def picture(self, name: str, png: bytes, step: int) -> None:
        self._report("picture", name, png, step)

    def note(self, text: str) -> None:
        self._report("note", text)


def start_control_actor() -> Any:
    """Start a desk on this node; return its handle, which may travel to any other."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(ControlActor).options(num_cpus=0, scheduling_strategy=here).remote()


def stop_requested(desk: Any) -> Callable[[], bool]:
    """Ask once, and look at each step whether the answer has come: that takes no time and no message."""
    import ray

    answer = desk.stopping.remote()
    return lambda: bool(ray.wait([answer], timeout=0)[0])


@contextmanager
def background_thread(
    work: Callable[[threading.Event], None], name: str, patience: float | None = None
) -> Iterator[None]:
    """Work in a thread until the block ends, of which an event tells it; then wait for it, up to `patience` seconds."""
    ended = threading.Event()
    thread = threading.Thread(target=work, args=(ended,), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(patience)


@contextmanager
def forwarding(desk: Any, reporter: Reporter) -> Iterator[None]:
    """Hand on what the workers report, until the block ends and the desk is empty."""
    import ray

    def forward(ended: threading.Event) -> None:
        while True:
            last = ended.is_set()
            try:
                reports = ray.get(desk.take_reports.remote())
            except ray.exceptions.RayError:  # the cluster is gone; training itself says so
                return
            for method, arguments in reports:
                getattr(reporter, method)(*arguments)
            if last:
                return
            ended.wait(POLL_INTERVAL_S)

    with background_thread(forward, "reports", PATIENCE_SECONDS):
        yield


@contextmanager
def fail_without_retry(desk: Any) -> Iterator[None]:
    """Keep what only the user can mend, and raise it at once when Ray Train, which cannot tell, tries again."""
    import ray

    if refusal := ray.get(desk.refusal.remote()):
        raise refusal
    try:
        yield
    except UserError as error:
        with suppress(ray.exceptions.RayError):
            ray.get(desk.refuse.remote(error.with_traceback(None)))
        raise
