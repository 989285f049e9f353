"""Signs of life of processes that map parts: one that stands still is ended, so that others do its part.

Ray replaces a process that dies; for one that hangs it waits without end. Each process leaves a sign at the desk every
second, from a thread of its own, however long its part takes.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

EVERY_SECONDS = 1.0
CALL_SECONDS = 10.0  # that an answer may take before it is asked for again
PATIENCE = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"  # as much as Ray Train has with workers that train
PATIENCE_SECONDS, LEAST_SECONDS = 60.0, 5 * EVERY_SECONDS


class Process(NamedTuple):
    """One process of the cluster, whoever else gets its number later."""

    node: str
    number: int
    began: str

    @classmethod
    def here(cls) -> "Process":
        """Name this process, a worker of Ray's."""
        import ray

        return cls(ray.get_runtime_context().get_node_id(), os.getpid(), _began(os.getpid()))


def beat(desk: Any) -> None:
    """Leave a sign of life at the desk until this process ends, or the desk does."""
    import ray

    here = Process.here()

    def leave_signs() -> None:
        with suppress(ray.exceptions.RayError):
            while True:
                with suppress(ray.exceptions.ActorUnavailableError, ray.exceptions.GetTimeoutError):  # a bad moment
                    ray.get(desk.sign.remote(here), timeout=CALL_SECONDS)
                time.sleep(EVERY_SECONDS)

    threading.Thread(target=leave_signs, name="pulse", daemon=True).start()


@contextmanager
def watching(desk: Any) -> Iterator[list[Process]]:
    """End what has left no sign for too long, for the length of the block; yield the list of what was ended so."""
    import ray

    over, ended, patience = threading.Event(), list[Process](), _patience()

    def watch() -> None:
        with suppress(ray.exceptions.RayError):  # the cluster is gone; the map itself says so
            while not over.wait(EVERY_SECONDS):
                with suppress(ray.exceptions.ActorUnavailableError, ray.exceptions.GetTimeoutError):  # a bad moment
                    for process in ray.get(desk.silent.remote(patience), timeout=CALL_SECONDS):
                        if not over.is_set():
                            _end(process, ended)

    thread = threading.Thread(target=watch, name="pulses", daemon=True)
    thread.start()
    try:
        yield ended
    finally:
        over.set()
        thread.join()  # before Ray may be shut down


def _patience() -> float:
    try:
        return max(float(os.environ.get(PATIENCE, "")), LEAST_SECONDS)
    except ValueError:  # Ray takes its default then, too
        return PATIENCE_SECONDS


def _end(process: Process, ended: list[Process]) -> None:
    """End a process, of which Ray Data alone has a handle, on whatever node it is; note it if it was still there.

    What fails is tried again when its patience is over once more.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(process.node, soft=False)
    task = ray.remote(_kill).options(num_cpus=0, scheduling_strategy=there)
    ended.append(process)  # before whoever waits for it hears of its end
    was_there = False
    with suppress(ray.exceptions.RayError):  # its node may have gone with it
        was_there = ray.get(task.remote(process), timeout=CALL_SECONDS)
    if not was_there:
        ended.remove(process)


def _kill(process: Process) -> bool:
    import psutil

    with suppress(psutil.NoSuchProcess, ProcessLookupError):
        if _began(process.number) == process.began:
            os.kill(process.number, signal.SIGKILL)
            return True
    return False


def _began(number: int) -> str:
    """Tell when a process began, where there is one by a clock that nobody can set."""
    import psutil

    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[19]  # proc(5): starttime
    except FileNotFoundError:
        return str(psutil.Process(number).create_time())
