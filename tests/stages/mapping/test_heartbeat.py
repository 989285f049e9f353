"""Heartbeat monitor: a worker that hangs is killed, and no other process is."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray.exceptions

from stages.mapping import heartbeat
from stages.mapping.heartbeat import WorkerProcess
from stages.mapping.parts import map_parts
from stages.runtime.context import StageContext
from stages.runtime.heartbeat_timeout import HEARTBEAT_TIMEOUT_VARIABLE
from tests.screen import Screen


class SquareThenHang:
    """Mapper that squares numbers, and pauses its whole process at part 1 the first time."""

    def __init__(self, folder: Path):
        self.marker = folder / "paused"

    def __call__(self, part: dict) -> dict:
        if part["number"] == 1 and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        return {"square": part["number"] ** 2}


@pytest.mark.ray
@pytest.mark.slow
def test_worker_that_hangs_is_killed_and_its_part_runs_again(context: StageContext, tmp_path: Path, monkeypatch):
    """Ray alone would wait for it without end."""
    monkeypatch.setenv(HEARTBEAT_TIMEOUT_VARIABLE, "10")
    screen = Screen()
    parts = [{"number": number} for number in range(4)]
    results = map_parts(SquareThenHang, (tmp_path,), parts, context=replace(context, reporter=screen), unit="part")
    assert [result["square"] for result in results] == [0, 1, 4, 9] and (tmp_path / "paused").exists()
    assert sorted(screen.messages) == [
        "A worker sent no heartbeat for 10 s and was killed.",
        "A worker was lost; its unfinished parts run again.",
    ]


def test_heartbeats_continue_until_the_control_actor_ends():
    """A missed answer ends nothing, because a worker without heartbeats would be killed."""
    unavailable, timeout = ray.exceptions.ActorUnavailableError("away", None), ray.exceptions.GetTimeoutError()
    answers = [None, unavailable, None, timeout, None, ray.exceptions.ActorDiedError()]

    def send() -> None:
        if answer := answers.pop(0):
            raise answer

    heartbeat._send_heartbeats(send, interval_s=0.0)
    assert answers == []


def test_process_that_could_not_be_killed_stays_registered(monkeypatch):
    """A kill that is still pending is cancelled: a paused node would kill the process after both have resumed."""
    answers = {"alive": True, "ended": False, "unreachable": ray.exceptions.NodeDiedError("a node"), "paused": None}
    unregistered, cancelled = [], []

    def get(task: str) -> bool:
        if isinstance(answers[task], Exception):
            raise answers[task]
        return answers[task]

    kill = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda process: process.start_time))
    monkeypatch.setattr("ray.remote", lambda function: kill)
    monkeypatch.setattr("ray.wait", lambda tasks, num_returns, timeout: (tasks[:3], tasks[3:]))
    monkeypatch.setattr("ray.get", get)
    monkeypatch.setattr("ray.cancel", lambda task, force: cancelled.append(task))
    control = SimpleNamespace(
        unregister=SimpleNamespace(remote=lambda process: unregistered.append(process.start_time))
    )
    processes = [WorkerProcess("ab" * 28, pid, name) for pid, name in enumerate(answers)]
    assert heartbeat._kill_workers(processes, control) == 1
    assert unregistered == ["alive", "ended"] and cancelled == ["paused"]


@pytest.mark.parametrize(
    ("text", "timeout_s"), [(None, 60), ("90", 90), ("0", 10), ("", 60), ("60s", 60), ("nan", 60), ("inf", 60)]
)
def test_timeout_is_that_of_ray_train(text: str | None, timeout_s: float):
    """The default is 60 s, also for text that is not a finite number, and the minimum is 10 s."""
    assert heartbeat._timeout_s({} if text is None else {HEARTBEAT_TIMEOUT_VARIABLE: text}) == timeout_s


def test_later_process_with_the_same_pid_is_not_killed():
    """The start time identifies the process."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        start_time = heartbeat._start_time(child.pid)
        assert not heartbeat._kill(WorkerProcess("node", child.pid, f"{start_time}0")) and child.poll() is None
        assert heartbeat._kill(WorkerProcess("node", child.pid, start_time))
        assert child.wait(10) == -signal.SIGKILL
    assert not heartbeat._kill(WorkerProcess("node", child.pid, start_time))  # it has ended
