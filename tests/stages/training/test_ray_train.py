"""Worker processes under Ray Train: two train what two processes without Ray do, and a lost one is replaced."""

import ipaddress
import json
import os
import re
import signal
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import ClassVar

import psutil
import pytest
import ray.util
import torch
from ray.train.torch import TorchTrainer

from models.vqvae import VQVAE
from stages import vqvae
from stages.config import ClusterConfig
from stages.errors import UserError
from stages.runtime.cluster import connect_cluster
from stages.runtime.context import Reporter, StageContext
from stages.training.checkpoint import Checkpoints
from stages.training.checkpoint_state import trained_weights
from stages.training.distributed import DistributedContext
from stages.training.ray_train import UNUSED_CALLBACKS, fit, train_or_load, trainer_class
from tests.gloo import train_with_ranks
from tests.screen import Screen

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """One cluster for all of these tests, because starting one takes seconds."""
    config = ClusterConfig(workers=2, cpus_per_worker=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("node")))  # inherited by the cluster's processes
        with connect_cluster(config):
            yield config


def context_in(folder: Path, cluster: ClusterConfig) -> StageContext:
    return StageContext("vqvae", "f", folder, cluster)


def die_once(*, dist: DistributedContext, context: StageContext, **arguments: object) -> None:
    """Train, but kill the process of rank 1 at its sixth step, the first time only."""
    marker, polls = context.work_dir / "died", count(1)

    def stop_requested() -> bool:
        if dist.rank == 1 and next(polls) == 6 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    vqvae.train_worker(dist=replace(dist, stop_requested=stop_requested), context=context, **arguments)


def die_once_on_own_disk(*, dist: DistributedContext, context: StageContext, shards: Path, **arguments: object) -> None:
    """Run `die_once`, after checking that this rank reads and writes folders of its node."""
    assert "checkpoints" in context.work_dir.parts and "inputs" in shards.parts
    die_once(dist=dist, context=context, shards=shards, **arguments)


def die(*, dist: DistributedContext, context: StageContext) -> None:
    """Kill the process of rank 1 each time; rank 0 waits for it in a collective."""
    if dist.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.zeros(1))


class KillsFirstWorker:
    """Argument that kills the worker that launches its training function, the first time only."""

    times_read: ClassVar[int] = 0  # by this process: a worker reads its arguments when it starts, and at the launch

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state
        KillsFirstWorker.times_read += 1
        # The controller reads them, too; Ray sets the title.
        if "RayTrainWorker" in psutil.Process().cmdline()[0] and KillsFirstWorker.times_read == 2:
            with suppress(FileExistsError):
                self.marker.touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)


def do_nothing(*, dist: DistributedContext, context: StageContext, argument: KillsFirstWorker) -> None:
    """Return at once."""
    (context.work_dir / str(dist.rank)).touch()


def write_context(*, dist: DistributedContext, context: StageContext) -> None:
    """Write what a worker learns about checkpoints by time and about speed."""
    values = [dist.checkpoint_timer.interval_s, dist.flops_per_image, dist.devices]
    (context.work_dir / f"{dist.rank}.json").write_text(json.dumps(values))


def raise_user_error(*, dist: DistributedContext, context: StageContext) -> None:
    """Fail on rank 1 as with damaged data; rank 0 waits for it in a collective."""
    if dist.rank == 1:
        with (context.work_dir / "attempts").open("a") as attempts:
            attempts.write("x")
        raise UserError("Image 7 is damaged.", where="shard", fix="Replace it.", code=4)
    dist.all_reduce(torch.zeros(1))


@pytest.fixture(scope="module")
def arguments(project):
    return {
        "shards": project.path("shards"),
        "vqvae": project.network,
        "augment": project.augment,
        "train_vqvae": project.train,
        "seed": 0,
    }


def train(train_worker, arguments, project, context: StageContext) -> tuple[dict, list]:
    """Train and return the weights and the curves."""
    context.work_dir.mkdir()
    network = VQVAE(project.network)
    history = train_or_load(train_worker, arguments, project.train, network=network, context=context)
    return network.state_dict(), history


def assert_equal(left: tuple[dict, list], right: tuple[dict, list]) -> None:
    """Compare weights and curves bit by bit."""
    assert left[1] == right[1] and left[0].keys() == right[0].keys()
    assert all(torch.equal(left[0][key], right[0][key]) for key in right[0])


def test_a_private_cluster_listens_on_the_loopback_interface_only(cluster):
    """Ray's default is every interface, protected only by a token sent in the clear."""
    addresses = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            connections = process.net_connections("tcp")
            addresses |= {socket.laddr.ip for socket in connections if socket.status == psutil.CONN_LISTEN}
    assert addresses and all(ipaddress.ip_address(ip.removeprefix("::ffff:")).is_loopback for ip in addresses)


def test_a_private_cluster_runs_nothing_without_use(cluster):
    """Ray also starts processes that forward output of workers and that ask a cloud for machines."""
    lines = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            lines.append(" ".join(process.cmdline()))
    assert any("gcs_server" in line for line in lines) and not any("monitor.py" in line for line in lines)


def test_training_starts_no_actor_without_use(cluster, monkeypatch):
    """Ray Train has these callbacks by default, under these names. A cluster of the user keeps the second one."""
    plain = TorchTrainer(print)._create_default_callbacks()
    assert {type(callback).__name__ for callback in plain} >= set(UNUSED_CALLBACKS)
    for address, expected in (("", []), ("host:1", ["PlacementGroupCleanerCallback"])):
        monkeypatch.setenv("RAY_ADDRESS", address)
        callbacks = [type(callback).__name__ for callback in trainer_class()(print)._create_default_callbacks()]
        assert [name for name in callbacks if name in UNUSED_CALLBACKS] == expected


def test_a_killed_worker_is_replaced_and_the_weights_are_those_of_an_unbroken_run(
    cluster, arguments, project, tmp_path: Path
):
    """After `kill -9` of a worker, weights and curves have the bits of two ranks that train without Ray."""
    killed = train(die_once, arguments, project, context_in(tmp_path / "killed", cluster))
    assert (tmp_path / "killed" / "died").exists()

    unbroken = context_in(tmp_path / "unbroken", cluster)
    unbroken.work_dir.mkdir()
    train_with_ranks(vqvae.train_worker, arguments, unbroken, world_size=2)
    state = Checkpoints(unbroken.work_dir, "f", keep=1).latest()
    assert state is not None
    assert_equal(killed, (trained_weights(state.tensors, project.train), state.history))


@pytest.mark.slow
def test_a_worker_that_dies_when_its_training_begins_is_replaced(cluster, tmp_path: Path):
    """Ray Train alone would give up, and keep the processors reserved."""
    context = replace(context_in(tmp_path, replace(cluster, max_failures=1)), reporter=Screen())
    fit(do_nothing, {"argument": KillsFirstWorker(tmp_path / "killed")}, context=context)
    assert len(context.reporter.messages) == 1
    lost = r"When training began, a worker on [\d.]+ was lost: its process or its node ended\."
    assert re.fullmatch(lost, context.reporter.messages[0])
    assert {path.name for path in tmp_path.iterdir()} == {"killed", "0", "1"}
    assert {entry["state"] for entry in ray.util.placement_group_table().values()} == {"REMOVED"}


@pytest.mark.slow
def test_only_rank_0_saves_by_time(cluster, tmp_path: Path):
    """The other ranks follow its clock. Every rank knows the cost of the network."""
    config = replace(cluster, checkpoint_every_minutes=2)
    fit(write_context, {}, context=replace(context_in(tmp_path, config), flops_per_image=7.0))
    values = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert values == [[120, 7, 2], [0, 7, 2]]


@pytest.mark.slow
def test_a_user_error_of_a_worker_ends_training_without_a_retry(cluster, tmp_path: Path):
    """The error is neither that of the peer, which fails in a collective, nor Ray's."""
    with pytest.raises(UserError, match=r"Image 7 is damaged"):
        fit(raise_user_error, {}, context=context_in(tmp_path, replace(cluster, max_failures=1)))
    assert (tmp_path / "attempts").read_text() == "x"


@pytest.mark.slow
def test_a_worker_lost_too_often_ends_training_with_one_sentence(cluster, tmp_path: Path, capfd):
    """Each loss is reported at once, and the error has the fix. Nothing of the peer's error or Ray's log is shown."""
    context = replace(context_in(tmp_path, replace(cluster, max_failures=1)), reporter=Screen())
    with pytest.raises(UserError) as caught:
        fit(die, {}, context=context)
    lost = rf"Worker 1 on {re.escape(ray.util.get_node_ip_address())} was lost: its process or its node ended\."
    messages = context.reporter.messages
    assert len(messages) == 2 and all(re.fullmatch(lost, message) for message in messages)
    assert re.fullmatch(rf"Workers failed 2 times; cluster\.max_failures is 1\. {lost}", caught.value.what)
    assert "raylet" not in capfd.readouterr().out
    assert (caught.value.where, caught.value.code) == (str(tmp_path), 3)
    assert "enough memory, then run the same command again" in caught.value.fix


def test_more_than_the_cluster_has_is_refused_at_once(cluster, tmp_path: Path):
    """Ray itself would wait for a GPU without a limit."""
    two_gpus = ClusterConfig(workers=2, cpus_per_worker=1, gpus_per_worker=1)
    with pytest.raises(UserError, match=r"2 workers need 2 GPUs"):
        fit(vqvae.train_worker, {}, context=context_in(tmp_path, two_gpus))


class InterruptOnce(Reporter):
    """Sends SIGINT to this process, as Ctrl-C does, when the first metrics arrive."""

    def __init__(self) -> None:
        self.interrupted = False

    def metrics(self, values, step: int) -> None:
        if not self.interrupted:
            self.interrupted = True
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
def test_a_signal_to_the_command_makes_the_workers_save(cluster, arguments, project, tmp_path: Path):
    """The stop request reaches the workers, and the command still raises KeyboardInterrupt."""
    long = {**arguments, "train_vqvae": replace(project.train, steps=100_000, evaluate_every=100_000)}
    with pytest.raises(KeyboardInterrupt):
        fit(vqvae.train_worker, long, context=replace(context_in(tmp_path, cluster), reporter=InterruptOnce()))
    assert list(tmp_path.glob("step-*[0-9]"))


@pytest.mark.slow
def test_workers_without_a_shared_disk_train_bit_identical_weights_after_a_kill(
    cluster, arguments, project, tmp_path: Path
):
    """Inputs and checkpoints go through the storage, and each worker has its own folder."""
    with_storage = replace(cluster, storage=f"file://{tmp_path}/store")
    shared = train(vqvae.train_worker, arguments, project, context_in(tmp_path / "shared", cluster))
    separate = train(die_once_on_own_disk, arguments, project, context_in(tmp_path / "separate", with_storage))
    assert_equal(separate, shared)
    stored = sorted(path.name for path in (tmp_path / "store" / "runs" / "vqvae" / "f").glob("step-*"))
    assert stored == ["step-000000008", "step-000000012"]
    assert len(list((tmp_path / "store" / "inputs").iterdir())) == 1
