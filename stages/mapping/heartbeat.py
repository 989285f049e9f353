"""Heartbeat monitor for Ray Data workers: kills workers that hang, so that their parts run again elsewhere.

Ray replaces a process that dies, but waits without end for one that hangs. Each worker sends a heartbeat to the control
actor every second from its own thread, so a long part does not delay it.
"""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from stages.runtime.control import background_thread
from stages.runtime.heartbeat_timeout import HEARTBEAT_TIMEOUT_S, HEARTBEAT_TIMEOUT_VARIABLE

HEARTBEAT_INTERVAL_S = 1.0
CALL_TIMEOUT_S = 3.0  # for one answer of the control actor; the call is then repeated
MIN_TIMEOUT_S = 10.0  # several heartbeats, so that one late heartbeat kills nothing


class WorkerProcess(NamedTuple):
    """Identity of a process of the cluster. The start time tells it from a later process with the same pid."""

    node_id: str
    pid: int
    start_time: str

    @classmethod
    def current(cls) -> "WorkerProcess":
        """Return the identity of this Ray worker."""
        import ray

        return cls(ray.get_runtime_context().get_node_id(), os.getpid(), _start_time(os.getpid()))


def start_heartbeat(control: Any) -> None:
    """Send heartbeats to the control actor from a thread, until this process or the actor ends."""
    import ray

    process = WorkerProcess.current()

    def send() -> None:
        ray.get(control.heartbeat.remote(process), timeout=CALL_TIMEOUT_S)

    threading.Thread(target=_send_heartbeats, args=(send,), name="heartbeat", daemon=True).start()


def _send_heartbeats(send: Callable[[], None], interval_s: float = HEARTBEAT_INTERVAL_S) -> None:
    """Call `send` at an interval until the control actor or the cluster is gone."""
    from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayError

    with suppress(RayError):
        while True:
            # One missed answer must not end the heartbeats: the monitor would kill a live worker.
            with suppress(ActorUnavailableError, GetTimeoutError):
                send()
            time.sleep(interval_s)


@contextmanager
def kill_stale_workers(control: Any, notify: Callable[[str], None]) -> Iterator[None]:
    """Kill workers without a heartbeat during the block, with one message for each.

    The timeout is RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S, as for training workers.
    """
    import ray

    timeout_s = _timeout_s(os.environ)

    def monitor(block_ended: threading.Event) -> None:
        with suppress(ray.exceptions.RayError):  # the cluster is gone; the map raises the error
            while not block_ended.wait(HEARTBEAT_INTERVAL_S):
                with suppress(ray.exceptions.ActorUnavailableError, ray.exceptions.GetTimeoutError):  # ask again
                    stale = ray.get(control.stale_workers.remote(timeout_s), timeout=CALL_TIMEOUT_S)
                    if stale and not block_ended.is_set():
                        for _ in range(_kill_workers(stale, control)):
                            notify(f"A worker sent no heartbeat for {timeout_s:g} s and was killed.")

    with background_thread(monitor, "heartbeat-monitor"):  # joined without a timeout: Ray may shut down only after it
        yield


def _timeout_s(environment: Mapping[str, str]) -> float:
    """Return the timeout of an environment. A value that is not a finite number gives the default."""
    try:
        timeout_s = float(environment.get(HEARTBEAT_TIMEOUT_VARIABLE, ""))
    except ValueError:
        return HEARTBEAT_TIMEOUT_S
    return max(timeout_s, MIN_TIMEOUT_S) if math.isfinite(timeout_s) else HEARTBEAT_TIMEOUT_S


def _kill_workers(processes: Sequence[WorkerProcess], control: Any) -> int:
    """Kill processes on their nodes by Ray tasks, since only Ray Data has handles of them; return how many were alive.

    The control actor reports a process that could not be killed again after another timeout.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    processes_by_task = {}
    for process in processes:
        same_node = NodeAffinitySchedulingStrategy(process.node_id, soft=False)
        kill = ray.remote(_kill).options(num_cpus=0, scheduling_strategy=same_node)
        processes_by_task[kill.remote(process)] = process
    finished, unfinished = ray.wait(list(processes_by_task), num_returns=len(processes_by_task), timeout=CALL_TIMEOUT_S)
    for task in unfinished:  # its node is paused; when the node resumes, so does the process
        ray.cancel(task, force=True)
    killed = 0
    for task in finished:
        with suppress(ray.exceptions.RayError):  # the node may be gone
            killed += ray.get(task)
            control.unregister.remote(processes_by_task[task])
    return killed


def _kill(process: WorkerProcess) -> bool:
    """Kill a process of this node. Return False if it had already ended."""
    import psutil

    with suppress(psutil.NoSuchProcess, ProcessLookupError):
        if _start_time(process.pid) == process.start_time:
            os.kill(process.pid, signal.SIGKILL)
            return True
    return False


def _start_time(pid: int) -> str:
    """Return the start time of a process: on Linux in clock ticks since boot, which no clock change can alter."""
    import psutil

    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]  # proc(5): starttime
    except FileNotFoundError:
        return str(psutil.Process(pid).create_time())
