"""Parallel map over parts: results are in order, errors are reported, and lost workers' parts run again."""

import errno
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray.exceptions
from safetensors import SafetensorError

from stages.config import ClusterConfig
from stages.errors import UserError
from stages.mapping import parts as parts_module
from stages.mapping.parts import Part, Result, map_parts, pack, unpack
from stages.runtime.context import StageContext
from tests.screen import Screen


def test_results_are_serialized_without_pickle():
    """Arrays and plain values are equal after a round trip; an array of objects is rejected."""
    result = {"array": np.arange(6, dtype=np.uint16).reshape(2, 3), "name": "a", "count": 3, "list": [1, None]}
    unpacked = unpack(pack(result))
    np.testing.assert_array_equal(unpacked.pop("array"), result.pop("array"))
    assert unpacked == result
    with pytest.raises(SafetensorError, match="object"):
        pack({"array": np.array([object()])})


class Square:
    """Mapper that squares numbers, and fails as a part requests."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / f"built-{os.getpid()}").touch()

    def __call__(self, part: Part) -> Result:
        marker = self.folder / f"killed-{part['number']}"
        if part.get("kill") and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if part.get("fail"):
            raise UserError("Shard 3 is damaged.", where=self.folder, fix="Fix it.", code=4)
        return {"square": part["number"] ** 2, "array": np.full(2, part["number"])}


@pytest.mark.ray
def test_results_are_in_the_order_of_the_parts_after_a_worker_is_killed(context: StageContext, tmp_path: Path):
    """The unfinished parts of the killed worker run again; no result is lost or doubled."""
    parts = [{"number": number, "kill": number == 3} for number in range(8)]
    screen = Screen()
    results = map_parts(Square, (tmp_path,), parts, context=replace(context, reporter=screen), unit="part")
    assert [result["square"] for result in results] == [number**2 for number in range(8)]
    assert (tmp_path / "killed-3").exists()
    assert screen.messages == ["A worker was lost; its unfinished parts run again."]


@pytest.mark.ray
def test_user_error_in_a_worker_is_raised_unchanged(context: StageContext, tmp_path: Path):
    """It is raised at once, without retries and tracebacks of Ray."""
    with pytest.raises(UserError, match=r"Shard 3 is damaged") as caught:
        map_parts(Square, (tmp_path,), [{"number": 0, "fail": True}], context=context, unit="part")
    assert caught.value.code == 4 and caught.value.fix == "Fix it."


def test_full_disk_in_a_worker_is_returned_as_a_user_error(tmp_path: Path, monkeypatch):
    """The error names the work folder if the system names no file; Ray raises other OSErrors."""

    def raise_os_error(part: Part) -> Result:
        raise OSError(part["number"], os.strerror(part["number"]))

    monkeypatch.setattr(parts_module, "start_heartbeat", lambda control: None)
    context = StageContext("codes", "f", tmp_path, ClusterConfig(cpus_per_worker=1))
    actor = parts_module._PartActor(lambda: raise_os_error, (), context, None, None)
    row = actor({"number": 0, "part": json.dumps({"number": errno.ENOSPC})})
    error = unpack(row["result"])["user_error"]
    assert error["what"] == "No space left on device." and error["where"] == str(tmp_path) and error["code"] == 3
    with pytest.raises(OSError, match="Input/output error"):
        actor({"number": 0, "part": json.dumps({"number": errno.EIO})})


class FailingSquare(Square):
    """Mapper that raises a UserError in its constructor, and leaves one file for each attempt."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        raise UserError("The input is damaged in the store.", where=folder, fix="Delete it there.", code=5)


@pytest.mark.ray
def test_user_error_in_a_constructor_is_raised_unchanged(context: StageContext, tmp_path: Path):
    """Ray would take it for a lost worker and try again."""
    with pytest.raises(UserError, match=r"The input is damaged") as caught:
        map_parts(FailingSquare, (tmp_path,), [{"number": 0}], context=context, unit="part")
    assert caught.value.code == 5 and caught.value.fix == "Delete it there."
    assert len(list(tmp_path.glob("built-*"))) == 1


def test_a_preempted_node_is_no_failure(tmp_path: Path):
    """Its parts run again, however often nodes are preempted."""
    errors = [ray.exceptions.RayActorError(preempted=True)] * 3

    def map_once(missing: dict[int, Part]) -> None:
        if errors:
            raise errors.pop()

    context = StageContext("codes", "f", tmp_path, ClusterConfig(max_failures=0), Screen())
    parts_module._map_until_complete(map_once, {0: {"number": 0}}, {}, context, lambda config: None)
    assert not errors and len(context.reporter.messages) == 3


@pytest.mark.parametrize(
    "error",
    [
        ray.exceptions.ActorDiedError(),
        ray.exceptions.ObjectLostError("0", None, ""),
        ray.exceptions.OutOfMemoryError("Memory was 23GB used / 24GB limit"),
        ray.exceptions.NodeDiedError("a node"),
        ray.exceptions.WorkerCrashedError(),
    ],
)
def test_repeated_loss_of_workers_raises_a_user_error(tmp_path: Path, error: Exception):
    """The map is tried `cluster.max_failures` times more, with a message and a check of the cluster each time."""
    attempts: list[dict[int, Part]] = []
    checked_workers: list[int] = []

    def map_once(missing: dict[int, Part]) -> None:
        attempts.append(missing)
        raise error

    screen = Screen()
    context = StageContext("codes", "f", tmp_path, ClusterConfig(workers=4, max_failures=2), screen)
    with pytest.raises(UserError, match="Workers were lost 3 times") as caught:
        parts_module._map_until_complete(
            map_once, {0: {"number": 0}}, {}, context, lambda config: checked_workers.append(config.workers)
        )
    assert (caught.value.where, caught.value.code, len(attempts)) == (str(tmp_path), 3, 3)
    assert "enough memory, then run the same command again" in caught.value.fix
    assert screen.messages == ["A worker was lost; its unfinished parts run again."] * 2
    assert checked_workers == [1, 1]  # before each retry: does a node with room for one worker remain?
