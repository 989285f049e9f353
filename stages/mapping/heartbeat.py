"""Signs of life of processes that map parts: one that stands still is ended, so that others do its part.

Ray replaces a process that dies; for one that hangs it waits without end. Each process leaves a sign at the desk every
second, from a thread of its own, however long its part takes.
"""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from stages.runtime.control import background_thread

EVERY_SECONDS = 1.0
CALL_TIMEOUT_S = 3.0  # that an answer may take before it is asked for again
PATIENCE = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"  # the same for workers that train
PATIENCE_SECONDS, MIN_TIMEOUT_S = 60.0, 10.0  # unless that says otherwise; a living process may be slow


class Process(NamedTuple):
    """One process of the cluster, whoever else gets its number later."""

    node: str
    number: int
    began: str

    @classmethod
    def current(cls) -> "Process":
        """Name this process, a worker of Ray's."""
        import ray

        return cls(ray.get_runtime_context().get_node_id(), os.getpid(), _began(os.getpid()))


def start_heartbeat(desk: Any) -> None:
    """Leave a sign of life at the desk until this process ends, or the desk does."""
    import ray

    here = Process.current()

    def leave_signs() -> None:
        with suppress(ray.exceptions.RayError):
            while True:
                with suppress(ray.exceptions.ActorUnavailableError, ray.exceptions.GetTimeoutError):  # a bad moment
                    ray.get(desk.sign.remote(here), timeout=CALL_TIMEOUT_S)
                time.sleep(EVERY_SECONDS)

    threading.Thread(target=leave_signs, name="pulse", daemon=True).start()


@contextmanager
def kill_stale_workers(desk: Any, note: Callable[[str], None]) -> Iterator[None]:
    """End what has left no sign for too long, for the length of the block, and say so."""
    import ray

    patience = _patience()

    def watch(over: threading.Event) -> None:
        with suppress(ray.exceptions.RayError):  # the cluster is gone; the map itself says so
            while not over.wait(EVERY_SECONDS):
                with suppress(ray.exceptions.ActorUnavailableError, ray.exceptions.GetTimeoutError):  # a bad moment
                    silent = ray.get(desk.silent.remote(patience), timeout=CALL_TIMEOUT_S)
                    if silent and not over.is_set():
                        for _ in range(_end(silent, desk)):
                            note(f"A worker has given no sign of life for {patience:g} s: it was ended.")

    with background_thread(watch, "pulses"):  # to its end: then Ray may be shut down
        yield


def _patience() -> float:
    try:
        seconds = float(os.environ.get(PATIENCE, ""))
    except ValueError:
        return PATIENCE_SECONDS
    return max(seconds, MIN_TIMEOUT_S) if math.isfinite(seconds) else PATIENCE_SECONDS


def _end(processes: Sequence[Process], desk: Any) -> int:
    """End processes, of which Ray Data alone has handles, on whatever nodes they are; count those still there.

    Whatever fails is tried again when the patience with it is over once more.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    tasks = {}
    for process in processes:
        there = NodeAffinitySchedulingStrategy(process.node, soft=False)
        tasks[ray.remote(_kill).options(num_cpus=0, scheduling_strategy=there).remote(process)] = process
    done, late = ray.wait(list(tasks), num_returns=len(tasks), timeout=CALL_TIMEOUT_S)
    for task in late:  # once its node wakes, the process may have woken, too
        ray.cancel(task, force=True)
    ended = 0
    for task in done:
        with suppress(ray.exceptions.RayError):  # its node may have gone with it
            ended += ray.get(task)
            desk.forget.remote(tasks[task])
    return ended


def _kill(process: Process) -> bool:
    """End a process of this node; say whether it was still there."""
    import psutil

    with suppress(psutil.NoSuchProcess, ProcessLookupError):
        if _began(process.number) == process.began:
            os.kill(process.number, signal.SIGKILL)
            return True
    return False


def _began(number: int) -> str:
    """Tell when a process began: on Linux by a clock that nobody can set, elsewhere by that of the system."""
    import psutil

    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[19]  # proc(5): starttime
    except FileNotFoundError:
        return str(psutil.Process(number).create_time())
