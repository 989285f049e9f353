"""Signs of life of processes that map parts: one that stands still is ended, so that others do its part.

Ray replaces a process that dies; for one that hangs it waits without end. Each process leaves a sign at the desk every
few seconds, from a thread of its own, however long its part takes.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

EVERY_SECONDS = 2.0
PATIENCE = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"  # seconds: as much as Ray Train has with workers that train


class Process(NamedTuple):
    """One process of the cluster, whoever else gets its number later."""

    node: str
    number: int
    began: float

    @classmethod
    def here(cls) -> "Process":
        """Name this process, a worker of Ray's."""
        import psutil
        import ray

        return cls(ray.get_runtime_context().get_node_id(), os.getpid(), psutil.Process().create_time())


def beat(desk: Any) -> None:
    """Leave a sign of life at the desk until this process ends, or the desk does."""
    import ray

    here = Process.here()

    def leave_signs() -> None:
        with suppress(ray.exceptions.RayError):
            while True:
                ray.get(desk.sign.remote(here))
                time.sleep(EVERY_SECONDS)

    threading.Thread(target=leave_signs, name="pulse", daemon=True).start()


@contextmanager
def watching(desk: Any) -> Iterator[list[Process]]:
    """End what has left no sign for too long, for the length of the block; yield the list of what was ended so."""
    import ray

    over, ended = threading.Event(), list[Process]()
    patience = float(os.environ.get(PATIENCE, "60"))

    def watch() -> None:
        with suppress(ray.exceptions.RayError):  # the cluster is gone; the map itself says so
            while not over.wait(EVERY_SECONDS):
                for process in ray.get(desk.silent.remote(patience)):
                    if _end(process):
                        ended.append(process)

    thread = threading.Thread(target=watch, name="pulses", daemon=True)
    thread.start()
    try:
        yield ended
    finally:
        over.set()
        thread.join(EVERY_SECONDS)


def _end(process: Process) -> bool:
    """End a process on whatever node it is, since Ray could only ask it to; say whether it was still there."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(process.node, soft=False)
    try:
        return bool(ray.get(ray.remote(_kill).options(num_cpus=0, scheduling_strategy=there).remote(process)))
    except ray.exceptions.RayError:  # its node has gone with it
        return False


def _kill(process: Process) -> bool:
    import psutil

    with suppress(psutil.NoSuchProcess, ProcessLookupError):
        if psutil.Process(process.number).create_time() == process.began:
            os.kill(process.number, signal.SIGKILL)
            return True
    return False
