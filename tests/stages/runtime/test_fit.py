"""Real worker processes under Ray Train: two are as one, and one that dies is replaced."""

import os
import signal
from itertools import count
from pathlib import Path

import pytest
import torch

from stages import vqvae
from stages.config import ClusterConfig
from stages.errors import UserError
from stages.runtime.cluster import connected
from stages.runtime.fit import STOP, fit, trained
from stages.runtime.loop import Stopped, Worker
from stages.runtime.run import Run

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def cluster():
    """One cluster for all of these tests: starting one costs seconds."""
    config = ClusterConfig(workers=2, cpus_per_worker=1)
    with connected(config):
        yield config


def run_in(folder: Path, cluster: ClusterConfig) -> Run:
    return Run("vqvae", "f", folder, cluster)


def dies_once(*, worker: Worker, run: Run, **arguments: object) -> None:
    """Kill the second worker's process, outright, at its sixth step; but only the first time."""
    mark, calls = run.work / "died", count(1)

    def stopping() -> bool:
        if worker.rank == 1 and next(calls) == 3 and not mark.exists():  # it is asked every two steps
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    vqvae.learn(worker=Worker(**{**vars(worker), "stopping": stopping}), run=run, **arguments)


def raises(*, worker: Worker, run: Run) -> None:
    """Fail as bad data would, in one worker; the other waits for it in a sum."""
    if worker.rank == 1:
        with (run.work / "tries").open("a") as tries:
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


def test_two_workers_learn_what_one_does_and_a_killed_one_is_replaced(cluster, arguments, project, tmp_path: Path):
    """After `kill -9` of a worker the run ends in the very bytes of an unbroken one, close to those of one worker."""
    for name, learn in (("unbroken", vqvae.learn), ("killed", dies_once)):
        (tmp_path / name).mkdir()
        weights, history = trained(learn, arguments, project.train, run=run_in(tmp_path / name, cluster))
        if name == "unbroken":
            expected, curves = weights, history
    assert (tmp_path / "killed" / "died").exists()
    assert history == curves
    assert all(torch.equal(weights[key], expected[key]) for key in expected)

    alone = ClusterConfig(workers=1, cpus_per_worker=1)
    (tmp_path / "alone").mkdir()
    single, _ = trained(vqvae.learn, arguments, project.train, run=run_in(tmp_path / "alone", alone))
    for name in expected:
        torch.testing.assert_close(single[name], expected[name], rtol=1e-3, atol=1e-4)


def test_the_first_cause_is_what_the_user_sees(cluster, tmp_path: Path):
    """Not the errors of the workers that fell with it, and not Ray's; what only the user can mend is tried once."""
    with pytest.raises(UserError, match=r"Image 7 is damaged"):
        fit(raises, {}, run=run_in(tmp_path, cluster))
    assert (tmp_path / "tries").read_text() == "x"


def test_more_than_the_cluster_has_is_refused_at_once(cluster, tmp_path: Path):
    """Ray alone would wait for a GPU without end."""
    with pytest.raises(UserError, match=r"2 workers need 2 GPUs; the cluster has 0"):
        fit(vqvae.learn, {}, run=run_in(tmp_path, ClusterConfig(workers=2, cpus_per_worker=1, gpus_per_worker=1)))


def test_a_stop_file_makes_every_worker_save_and_end(cluster, arguments, tmp_path: Path):
    """This is how a signal to the command reaches workers on other machines."""

    with pytest.raises(Stopped):
        fit(stops, arguments, run=run_in(tmp_path, cluster))
    assert list(tmp_path.glob("step-*[0-9]"))


def stops(*, worker: Worker, run: Run, **arguments: object) -> None:
    (run.work / STOP).touch()
    vqvae.learn(worker=worker, run=run, **arguments)
