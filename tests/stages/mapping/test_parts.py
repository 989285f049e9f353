"""Parts done side by side by Ray Data: in order, by workers built once, and again when a worker is lost."""

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray.exceptions

from stages.config import ClusterConfig
from stages.errors import UserError
from stages.formats import artifact
from stages.mapping import heartbeat
from stages.mapping import parts as parts_module
from stages.mapping.parts import map_parts, pack, unpack
from stages.mapping.remote_parts import NodeWorkspace, TransferPlan
from stages.runtime.cluster import connect_cluster
from stages.runtime.context import StageContext
from stages.runtime.control import ControlActor
from tests.screen import Screen


def test_results_cross_processes_without_code():
    """Arrays and plain values return as they were; an object that would need pickle is refused."""
    result = {"array": np.arange(6, dtype=np.uint16).reshape(2, 3), "name": "a", "count": 3, "list": [1, None]}
    found = unpack(pack(result))
    np.testing.assert_array_equal(found.pop("array"), result.pop("array"))
    assert found == result
    with pytest.raises(ValueError, match="pickle"):
        pack({"array": np.array([object()])})


class Square:
    """Square numbers; fail as each part says."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / f"built-{os.getpid()}").touch()

    def __call__(self, part: dict) -> dict:
        mark = self.folder / f"died-{part['number']}"
        if part.get("dies") and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if part.get("wrong"):
            raise UserError("Shard 3 is damaged.", where=self.folder, fix="Mend it.", code=4)
        return {"square": part["number"] ** 2, "array": np.full(2, part["number"])}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = ClusterConfig(workers=2, cpus_per_worker=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("node")))  # of the nodes, which begin here
        with connect_cluster(config):
            yield StageContext("codes", "f", tmp_path_factory.mktemp("work"), config)


@pytest.mark.ray
def test_results_come_in_the_order_of_the_parts_although_a_worker_is_killed(context: StageContext, tmp_path: Path):
    """What the killed worker had not finished is done again; nothing is lost or doubled."""
    parts = [{"number": number, "dies": number == 3} for number in range(8)]
    screen = Screen()
    results = map_parts(Square, (tmp_path,), parts, context=replace(context, reporter=screen), unit="part")
    assert [result["square"] for result in results] == [number**2 for number in range(8)]
    assert (tmp_path / "died-3").exists()
    assert screen.notes == ["A worker was lost; what it had not finished is done again."]


@pytest.mark.ray
def test_a_users_error_in_a_worker_is_shown_as_it_is(context: StageContext, tmp_path: Path):
    """One clear message, at once, without retries."""
    with pytest.raises(UserError, match=r"Shard 3 is damaged") as caught:
        map_parts(Square, (tmp_path,), [{"number": 0, "wrong": True}], context=context, unit="part")
    assert caught.value.code == 4 and caught.value.fix == "Mend it."


def test_a_disk_that_takes_nothing_is_an_answer_too(tmp_path: Path, monkeypatch):
    """It names the work folder where the system names nothing; other errors are for Ray to raise."""

    def full(part: dict) -> dict:
        raise OSError(part["number"], os.strerror(part["number"]))

    monkeypatch.setattr("torch.set_num_threads", lambda number: None)  # it would hold for all tests that follow
    monkeypatch.setattr(parts_module, "beat", lambda desk: None)
    call = parts_module._Call(lambda: full, (), StageContext("codes", "f", tmp_path, ClusterConfig()), None, None)
    answer = unpack(call({"number": 0, "part": json.dumps({"number": errno.ENOSPC})})["result"])["user_error"]
    assert answer["what"] == "No space left on device." and answer["where"] == str(tmp_path) and answer["code"] == 3
    with pytest.raises(OSError, match="Input/output error"):
        call({"number": 0, "part": json.dumps({"number": errno.EIO})})


class Refuses(Square):
    """Refuse as soon as it is built, and count how often that is."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        raise UserError("The input is damaged in the store.", where=folder, fix="Delete it there.", code=5)


@pytest.mark.ray
def test_a_refusal_while_a_worker_is_built_is_shown_as_it_is(context: StageContext, tmp_path: Path):
    """To Ray it would be a lost worker, and be tried again."""
    with pytest.raises(UserError, match=r"The input is damaged") as caught:
        map_parts(Refuses, (tmp_path,), [{"number": 0}], context=context, unit="part")
    assert caught.value.code == 5 and caught.value.fix == "Delete it there."
    assert len(list(tmp_path.glob("built-*"))) == 1


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
def test_workers_that_are_lost_time_and_again_end_in_a_letter(tmp_path: Path, monkeypatch, error: Exception):
    """After as many tries as the settings allow, with the fix; each loss is told when it happens."""
    tries: list[int] = []

    def lost(*arguments: object) -> None:
        tries.append(0)
        raise error

    monkeypatch.setattr(parts_module, "_map", lost)
    monkeypatch.setattr(parts_module.cluster, "connected", lambda config: nullcontext())
    monkeypatch.setattr(parts_module, "open_desk", lambda: None)
    monkeypatch.setattr(parts_module, "watching", lambda desk, note: nullcontext())
    checked: list[int] = []
    monkeypatch.setattr(parts_module.cluster, "check", lambda config: checked.append(config.workers))
    screen = Screen()
    alone = StageContext("codes", "f", tmp_path, ClusterConfig(workers=4, max_failures=2), screen)
    with pytest.raises(UserError, match="Workers were lost 3 times") as caught:
        map_parts(Square, (tmp_path,), [{"number": 0}], context=alone, unit="part")
    assert (caught.value.where, caught.value.code, len(tries)) == (str(tmp_path), 3, 3)
    assert "memory enough, then run the same command again" in caught.value.fix
    assert screen.notes == ["A worker was lost; what it had not finished is done again."] * 2
    assert checked == [1, 1]  # before each repetition: is there a node left that one fits on?


class Hangs(Square):
    """Stand still at one part, as a whole process, the first time."""

    def __call__(self, part: dict) -> dict:
        mark = self.folder / "stood"
        if part["number"] == 1 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().__call__(part)


@pytest.mark.ray
def test_a_worker_that_stands_still_is_ended_and_its_part_done_again(
    context: StageContext, tmp_path: Path, monkeypatch
):
    """Ray alone waits for it without end."""
    monkeypatch.setenv(heartbeat.PATIENCE, "10")
    screen = Screen()
    results = map_parts(
        Hangs,
        (tmp_path,),
        [{"number": number} for number in range(4)],
        context=replace(context, reporter=screen),
        unit="part",
    )
    assert [result["square"] for result in results] == [0, 1, 4, 9] and (tmp_path / "stood").exists()
    assert sorted(screen.notes) == [
        "A worker has given no sign of life for 10 s: it was ended.",
        "A worker was lost; what it had not finished is done again.",
    ]


def test_signs_of_life_are_left_as_long_as_there_is_a_desk(monkeypatch):
    """A bad moment ends nothing: a worker without signs would be taken for one that hangs."""
    moments = [None, ray.exceptions.ActorUnavailableError("away", None), None, ray.exceptions.GetTimeoutError(), None]
    answers = iter([*moments, ray.exceptions.ActorDiedError()])
    signs: list[heartbeat.Process] = []
    found = threading.Event()

    def get(sign: heartbeat.Process, timeout: float) -> None:
        assert found.wait(10)
        signs.append(sign)
        if answer := next(answers):
            raise answer

    here = heartbeat.Process("node", os.getpid(), "now")
    monkeypatch.setattr("ray.get", get)
    monkeypatch.setattr(heartbeat, "EVERY_SECONDS", 0.01)
    monkeypatch.setattr(heartbeat.Process, "here", lambda: here)
    heartbeat.start_heartbeat(SimpleNamespace(sign=SimpleNamespace(remote=lambda process: process)))
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "pulse")
    found.set()
    thread.join(10)
    assert not thread.is_alive() and signs == [here] * 6


def test_who_leaves_signs_is_spared_and_who_leaves_none_is_named_until_it_is_gone(monkeypatch):
    """Each again after as long: the first try to end it may fail."""
    now = [0.0]
    monkeypatch.setattr("stages.runtime.control.time", SimpleNamespace(monotonic=lambda: now[0]))
    desk, named = ControlActor(), []
    for second in range(50):
        now[0] = float(second)
        asyncio.run(desk.sign("alive"))
        if second < 4:
            asyncio.run(desk.sign("hangs"))
        named += [(second, process) for process in asyncio.run(desk.silent(20.0))]
    assert named == [(24, "hangs"), (45, "hangs")]
    asyncio.run(desk.forget("hangs"))
    for now[0] in range(50, 100):
        asyncio.run(desk.sign("alive"))
        assert asyncio.run(desk.silent(20.0)) == []


def test_where_all_have_stood_still_together_nobody_is_named(monkeypatch):
    """As in a machine that was frozen: whoever asks may be the first to wake."""
    now = [0.0]
    monkeypatch.setattr("stages.runtime.control.time", SimpleNamespace(monotonic=lambda: now[0]))
    desk = ControlActor()
    asyncio.run(desk.sign("one"))
    assert asyncio.run(desk.silent(20.0)) == []
    now[0] = 1000.0
    assert asyncio.run(desk.silent(20.0)) == []
    named = []
    for now[0] in range(1001, 1022):
        named += asyncio.run(desk.silent(20.0))
    assert named == ["one"]  # it has not woken


def test_what_could_not_be_ended_is_not_forgotten_and_what_comes_too_late_is_taken_back(monkeypatch):
    """A node that sleeps would end its process on waking, when that has woken, too."""
    answers = {"there": True, "gone": False, "away": ray.exceptions.NodeDiedError("a node"), "asleep": None}
    forgotten, cancelled = [], []

    def get(task: str) -> bool:
        if isinstance(answers[task], Exception):
            raise answers[task]
        return answers[task]

    kill = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda process: process.began))
    monkeypatch.setattr("ray.remote", lambda function: kill)
    monkeypatch.setattr("ray.wait", lambda tasks, num_returns, timeout: (tasks[:3], tasks[3:]))
    monkeypatch.setattr("ray.get", get)
    monkeypatch.setattr("ray.cancel", lambda task, force: cancelled.append(task))
    desk = SimpleNamespace(forget=SimpleNamespace(remote=lambda process: forgotten.append(process.began)))
    assert (
        heartbeat._end([heartbeat.Process("ab" * 28, number, name) for number, name in enumerate(answers)], desk) == 1
    )
    assert forgotten == ["there", "gone"] and cancelled == ["asleep"]


@pytest.mark.parametrize(
    ("given", "seconds"), [(None, 60), ("90", 90), ("0", 10), ("", 60), ("60s", 60), ("nan", 60), ("inf", 60)]
)
def test_the_patience_with_workers_is_that_of_ray_train(monkeypatch, given: str | None, seconds: float):
    """What is no number is a minute, and nobody is ended between two signs."""
    monkeypatch.delenv(heartbeat.PATIENCE, raising=False)
    if given is not None:
        monkeypatch.setenv(heartbeat.PATIENCE, given)
    assert heartbeat._patience() == seconds


def test_only_the_process_that_was_meant_is_ended():
    """Not one that has got its number since."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        began = heartbeat._began(child.pid)
        assert not heartbeat._kill(heartbeat.Process("node", child.pid, f"{began}0")) and child.poll() is None
        assert heartbeat._kill(heartbeat.Process("node", child.pid, began))
        assert child.wait(10) == -signal.SIGKILL
    assert not heartbeat._kill(heartbeat.Process("node", child.pid, began))  # has ended since


class Copy:
    """Write what an input says into a file of the part's own; tell where, and that it was done."""

    def __init__(self, model: Path, calls: str, work: Path):
        self.model, self.calls, self.work = model, calls, work

    def __call__(self, part: dict) -> dict:
        Path(self.calls.removeprefix("of "), f"{part['number']}-{os.getpid()}").touch()
        if part["number"] == 2 and not (mark := self.model.parent / "died").exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        text = (self.model / "weights").read_text() + Path(part["model"], "weights").read_text()
        (self.work / f"{part['number']}.txt").write_text(text)
        return {"file": f"{part['number']}.txt", "seen": str(self.model), "array": np.full(3, part["number"])}


def files_of(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.mark.ray
def test_without_a_shared_disk_files_and_results_come_home_and_are_made_once(context: StageContext, tmp_path: Path):
    """A killed worker's part is done again; a rerun finds all parts finished, although this node has lost them."""
    apart = replace(
        context, work=tmp_path / "work", cluster=replace(context.cluster, storage=f"file://{tmp_path}/store")
    )
    work = apart.work / "parts"
    work.mkdir(parents=True)
    (tmp_path / "calls").mkdir()
    with artifact.commit_folder(tmp_path / "model", "model", {}) as folder:
        (folder / "weights").write_text("w")
    parts = [{"number": number, "model": str(tmp_path / "model")} for number in range(4)]
    arguments = (tmp_path / "model", f"of {tmp_path / 'calls'}", work)  # what is no path is left alone
    results = map_parts(Copy, arguments, parts, context=apart, unit="part")
    assert [result["file"] for result in results] == [f"{number}.txt" for number in range(4)]
    assert [result["array"].tolist() for result in results] == [[number] * 3 for number in range(4)]
    assert all(not Path(result["seen"]).is_relative_to(tmp_path) for result in results)
    expected = {f"{number}.txt": "ww" for number in range(4)}
    assert files_of(work) == expected

    calls = len(list((tmp_path / "calls").iterdir()))
    for path in work.iterdir():
        path.unlink()
    again = map_parts(Copy, arguments, parts, context=apart, unit="part")
    assert len(list((tmp_path / "calls").iterdir())) == calls
    assert files_of(work) == expected and [result["seen"] for result in again] == [r["seen"] for r in results]


@pytest.mark.ray
def test_what_the_store_has_spoilt_on_the_way_home_is_told_with_its_place(
    context: StageContext, tmp_path: Path, monkeypatch
):
    """And is not taken for what the part has made."""
    apart = replace(
        context, work=tmp_path / "work", cluster=replace(context.cluster, storage=f"file://{tmp_path}/store")
    )
    (apart.work / "parts").mkdir(parents=True)
    with artifact.commit_folder(tmp_path / "model", "model", {}) as folder:
        (folder / "weights").write_text("w")
    (tmp_path / "calls").mkdir()
    arguments = (tmp_path / "model", f"of {tmp_path / 'calls'}", apart.work / "parts")
    monkeypatch.setattr(TransferPlan, "fetch", lambda *_: None)
    with pytest.raises(UserError, match=r"What part 0 has made is damaged\.") as caught:
        map_parts(Copy, arguments, [{"number": 0, "model": str(tmp_path / "model")}], context=apart, unit="part")
    assert caught.value.where == f"file://{tmp_path}/store/runs/codes/f/parts" and caught.value.code == 5
    assert caught.value.fix == "Run the same command again; it is made anew."


@pytest.mark.ray
def test_what_is_no_artifact_stays_on_its_node(context: StageContext, tmp_path: Path):
    """Raw images are where they are: their shards are made there, storage or not."""
    apart = replace(context, cluster=replace(context.cluster, storage=f"file://{tmp_path}/store"))
    results = map_parts(Square, (tmp_path,), [{"number": 3}], context=apart, unit="part")
    assert results[0]["square"] == 9 and list(tmp_path.glob("built-*"))


def test_a_part_whose_keeping_is_damaged_is_done_again(tmp_path: Path, monkeypatch):
    """Inputs in folders of artifacts find their way, too; what the store spoils counts as not done."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "node"))
    config = ClusterConfig(storage=f"file://{tmp_path}/store")
    context = StageContext("sample", "f", tmp_path / "work", config)
    (context.work / "parts").mkdir(parents=True)
    for level in ("top", "bottom"):
        with artifact.commit_folder(tmp_path / "priors" / level, "prior", {}) as folder:
            (folder / "weights").write_text(level)
    journey = TransferPlan.planned(context, (tmp_path / "priors", context.work / "parts"), [{"number": 0}])
    assert journey is not None
    node = NodeWorkspace(journey)
    priors, work = node.localize_paths((tmp_path / "priors", context.work / "parts"))
    assert [(priors / level / "weights").read_text() for level in ("top", "bottom")] == ["top", "bottom"]
    for _ in range(2):
        (work / "a").write_text("a")
        node.keep("x", b"result")
        assert not list(work.iterdir())
        assert journey.finished() == {"x"} and journey.fetch("x", context.work) == b"result"
        assert (context.work / "parts" / "a").read_text() == "a"
        (tmp_path / "store/runs/sample/f/parts/x/a").write_text("b")
        assert journey.fetch("x", context.work) is None
        assert journey.finished() == set()
