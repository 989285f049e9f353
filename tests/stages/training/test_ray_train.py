"""Real worker processes under Ray Train: two are as one, and one that dies is replaced."""

import ipaddress
import os
import re
import signal
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import ray.exceptions
import ray.train
import torch
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)

from models.vqvae import VQVAE
from stages import vqvae
from stages.config import ClusterConfig
from stages.errors import UserError
from stages.runtime.cluster import connect_cluster
from stages.runtime.context import Reporter, StageContext
from stages.training import ray_train as fit_module
from stages.training.loop import CheckpointMismatch, Worker
from stages.training.ray_train import _root_cause, _telling, describe_failure, fit, summarize_error, train_or_load
from tests.screen import Screen

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """One cluster for all of these tests: starting one costs seconds."""
    config = ClusterConfig(workers=2, cpus_per_worker=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("node")))  # of the nodes, which begin here
        with connect_cluster(config):
            yield config


def run_in(folder: Path, cluster: ClusterConfig) -> StageContext:
    return StageContext("vqvae", "f", folder, cluster)


def dies_once(*, worker: Worker, context: StageContext, **arguments: object) -> None:
    """Kill the second worker's process, outright, at its sixth step; but only the first time."""
    mark, calls = context.work / "died", count(1)

    def stopping() -> bool:
        if worker.rank == 1 and next(calls) == 3 and not mark.exists():  # it is asked every two steps
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    vqvae.learn(worker=Worker(**{**vars(worker), "stopping": stopping}), context=context, **arguments)


def raises(*, worker: Worker, context: StageContext) -> None:
    """Fail as bad data would, in one worker; the other waits for it in a sum."""
    if worker.rank == 1:
        with (context.work / "tries").open("a") as tries:
            tries.write("x")
        raise UserError("Image 7 is damaged.", where="shard", fix="Mend it.", code=4)
    worker.reduce(torch.zeros(1))


@pytest.fixture(scope="module")
def arguments(project):
    return {
        "shards": project.path("shards"),
        "vqvae": project.network,
        "augment": project.augment,
        "train_vqvae": project.train,
        "seed": 0,
    }


def test_a_cluster_of_ours_listens_on_this_machine_alone(cluster):
    """Ray's default is every interface; a token that travels in the clear is all that would stand before it."""
    open_at = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            open_at |= {c.laddr.ip for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert open_at and all(ipaddress.ip_address(ip.removeprefix("::ffff:")).is_loopback for ip in open_at)


def test_two_workers_learn_what_one_does_and_a_killed_one_is_replaced(cluster, arguments, project, tmp_path: Path):
    """After `kill -9` of a worker the run ends in the very bytes of an unbroken one, close to those of one worker."""
    found = {}
    for name, train_worker in (("unbroken", vqvae.learn), ("killed", dies_once)):
        (tmp_path / name).mkdir()
        network = VQVAE(project.network)
        history = train_or_load(
            train_worker, arguments, project.train, network=network, context=run_in(tmp_path / name, cluster)
        )
        found[name] = network.state_dict(), history
    assert (tmp_path / "killed" / "died").exists()
    assert_equal(found["killed"], found["unbroken"])

    alone, context = VQVAE(project.network), run_in(tmp_path / "alone", ClusterConfig(workers=1, cpus_per_worker=1))
    context.work.mkdir()
    train_or_load(vqvae.learn, arguments, project.train, network=alone, context=context)
    for name, weight in found["unbroken"][0].items():
        torch.testing.assert_close(alone.state_dict()[name], weight, rtol=1e-3, atol=1e-4)


def assert_equal(found: tuple[dict, list], expected: tuple[dict, list]) -> None:
    """To the bit, curves included."""
    assert found[1] == expected[1] and found[0].keys() == expected[0].keys()
    assert all(torch.equal(found[0][key], expected[0][key]) for key in expected[0])


def test_the_first_cause_is_what_the_user_sees(cluster, tmp_path: Path):
    """Not the errors of the workers that fell with it, and not Ray's; what only the user can mend is tried once."""
    with pytest.raises(UserError, match=r"Image 7 is damaged"):
        fit(raises, {}, context=run_in(tmp_path, replace(cluster, max_failures=1)))
    assert (tmp_path / "tries").read_text() == "x"


def dies(*, worker: Worker, context: StageContext) -> None:
    """End one worker each time; the other waits for it in a sum."""
    if worker.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    worker.reduce(torch.zeros(1))


def test_a_worker_that_is_lost_too_often_is_told_in_a_sentence(cluster, tmp_path: Path, capfd):
    """Each loss when it happens, and at last what to do; not what its partner met, nor what Ray has to say."""
    context = replace(run_in(tmp_path, replace(cluster, max_failures=1)), reporter=Screen())
    with pytest.raises(UserError) as told:
        fit(dies, {}, context=context)
    lost = rf"Worker 1 on {re.escape(ray.util.get_node_ip_address())} was lost: its process or its node ended\."
    assert len(context.reporter.notes) == 2 and all(re.fullmatch(lost, note) for note in context.reporter.notes)
    assert re.fullmatch(rf"Workers failed 2 times; cluster\.max_failures is 1\. {lost}", told.value.what)
    assert "raylet" not in capfd.readouterr().out
    assert (told.value.where, told.value.code) == (str(tmp_path), 3)
    assert "memory enough, then run the same command again" in told.value.fix


@pytest.mark.parametrize(
    ("first", "told"),
    [
        (UserError("Image 7 is damaged.", where="a shard", fix="Mend it."), ""),
        (
            ray.exceptions.OutOfMemoryError("Memory was 23GB used / 24GB limit"),
            "was lost: its node had no memory left.",
        ),
        (ray.exceptions.ActorDiedError(), "was lost: its process or its node ended."),
        (WorkerHealthCheckTimeoutError("Worker 1 hangs"), "was lost: it no longer answered."),
        (ValueError("a program's mistake"), ""),
    ],
)
def test_the_root_of_several_failures_is_the_one_that_the_others_followed(first: Exception, told: str):
    """A worker whose partner is gone fails in a sum, often as the first to be heard of."""
    broken = RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection closed by peer")
    followed = UserExceptionWithTraceback(broken, "a traceback")
    seen = WorkerHealthCheckFailedError("A worker health check failed.", first)
    assert _root_cause({0: followed, 1: seen}) == (1, first)
    assert _root_cause({0: followed}) == (0, broken)
    assert describe_failure(first) == told
    assert describe_failure(broken) == "lost touch with another."


def test_more_than_the_cluster_has_is_refused_at_once(cluster, tmp_path: Path):
    """Ray alone would wait for a GPU without end."""
    with pytest.raises(UserError, match=r"2 workers need 2 GPUs; the cluster has 0"):
        fit(vqvae.learn, {}, context=run_in(tmp_path, ClusterConfig(workers=2, cpus_per_worker=1, gpus_per_worker=1)))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_cluster_that_ends_is_told_in_a_sentence(wrapped: bool):
    """Not in the words of Ray's protocol; what the controller says itself is kept."""
    lost = ray.exceptions.ActorUnavailableError("RpcError: RPC error: Socket closed rpc_code: 14", None)
    told = summarize_error(ray.train.ControllerError(lost) if wrapped else lost)
    assert told == "the Ray cluster ended, or the node that led training did."
    assert summarize_error(ray.train.ControllerError(OSError("a\nno space"))) == "no space"


class Interrupts(Reporter):
    """Press Ctrl-C, as it were, when the first numbers arrive."""

    def metrics(self, values, step: int) -> None:
        if not hasattr(self, "step"):
            self.step = step
            os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_to_the_command_makes_every_worker_save_and_end(cluster, arguments, project, tmp_path: Path):
    """It reaches workers wherever they are, and lets through what interrupted the command."""
    long = {**arguments, "train_vqvae": replace(project.train, steps=100_000, evaluate_every=100_000)}
    with pytest.raises(KeyboardInterrupt):
        fit(vqvae.learn, long, context=replace(run_in(tmp_path, cluster), reporter=Interrupts()))
    assert list(tmp_path.glob("step-*[0-9]"))


@pytest.mark.slow
def test_workers_without_a_shared_disk_make_the_same_bytes_and_go_on_after_a_kill(
    cluster, arguments, project, tmp_path: Path
):
    """Inputs and checkpoints pass through the storage alone: each worker reads and writes a folder of its own."""
    apart = replace(cluster, storage=f"file://{tmp_path}/store")
    found = {}
    for name, config, train_worker in (("shared", cluster, vqvae.learn), ("apart", apart, dies_once_apart)):
        (tmp_path / name).mkdir()
        network = VQVAE(project.network)
        history = train_or_load(
            train_worker, arguments, project.train, network=network, context=run_in(tmp_path / name, config)
        )
        found[name] = network.state_dict(), history
    assert_equal(found["apart"], found["shared"])
    stored = sorted(path.name for path in (tmp_path / "store" / "runs" / "vqvae" / "f").glob("step-*"))
    assert stored == ["step-000000008", "step-000000012"]
    assert len(list((tmp_path / "store" / "inputs").iterdir())) == 1


def dies_once_apart(*, worker: Worker, context: StageContext, shards: Path, **arguments: object) -> None:
    """As above, in folders of the node that the test's process knows nothing of."""
    assert f"rank-{worker.rank}" in context.work.parts and "inputs" in shards.parts
    dies_once(worker=worker, context=context, shards=shards, **arguments)


@pytest.fixture
def ends_with(tmp_path: Path, monkeypatch) -> Callable[[Exception], UserError]:
    """Give what a user is told where Ray Train ends with an error."""

    def told(error: Exception) -> UserError:
        def ends(*_: object) -> None:
            raise error

        monkeypatch.setattr(fit_module.cluster, "connected", lambda config: nullcontext())
        for name in ("open_desk", "_in_background"):
            monkeypatch.setattr(fit_module, name, lambda *_: None)
        monkeypatch.setattr(fit_module, "forwarding", lambda *_: nullcontext())
        monkeypatch.setattr(fit_module, "RemoteReporter", lambda desk: Reporter())
        monkeypatch.setattr(fit_module, "_wait", ends)
        monkeypatch.setattr("ray.train.torch.TorchTrainer", lambda *_, **__: SimpleNamespace(fit=None))
        with pytest.raises(UserError) as caught:
            fit(vqvae.learn, {}, context=run_in(tmp_path, ClusterConfig(workers=2)))
        assert caught.value.code == 3
        return caught.value

    return told


def test_training_that_cannot_go_on_is_a_letter(ends_with, tmp_path: Path):
    """In the controller's own words."""
    told = ends_with(ray.train.ControllerError(OSError("the store is full")))
    assert told.what == "Training could not go on: the store is full" and told.where == str(tmp_path)
    assert told.fix == "Run the same command again; it goes on from the newest checkpoint."


def test_workers_that_find_no_room_are_told_in_the_words_of_the_check(ends_with, monkeypatch):
    """It says what is missing; the controller only that time was up."""

    def too_small(config: ClusterConfig) -> None:
        raise UserError("2 workers need 2 CPUs; the cluster has 1.", where="cluster", fix="Add nodes.", code=3)

    monkeypatch.setattr(fit_module.cluster, "check", too_small)
    told = ends_with(ray.train.ControllerError(OSError("Worker group startup timed out")))
    assert told.what == "2 workers need 2 CPUs; the cluster has 1."


def test_workers_that_find_different_checkpoints_time_and_again_are_a_letter(ends_with, tmp_path: Path):
    """With the steps, and what to do where no disk is shared."""
    mismatch = CheckpointMismatch("The workers' newest checkpoints are of steps 4, 8.")
    told = ends_with(ray.train.WorkerGroupError("failed", {1: UserExceptionWithTraceback(mismatch, "a traceback")}))
    assert told.what == str(mismatch) and told.where == str(tmp_path)
    assert told.fix == "Run the same command again. If the nodes share no disk, set cluster.storage first."


def test_a_worker_that_raises_is_told_when_it_begins_again(tmp_path: Path):
    """Its own words, with its number; what the user is to mend ends training, and is told then."""
    screen = Screen()
    _telling(screen).after_exception(None, {1: UserExceptionWithTraceback(RuntimeError("a\nno luck"), "a traceback")})
    _telling(screen).after_exception(None, {0: UserError("Image 7 is damaged.", where="a shard", fix="Mend it.")})
    assert screen.notes == ["Worker 1 raised RuntimeError: no luck"]
