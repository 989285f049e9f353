"""Number of training workers: fixed, or from a range on a cluster whose nodes change. Without Ray."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from stages.cluster_config import ClusterConfig
from stages.errors import UserError
from stages.runtime import cluster
from stages.runtime.context import StageContext
from stages.training.elastic import (
    CAPACITY_TIMEOUT_S,
    MAX_CONTROLLER_FAILURES,
    MAX_ELASTIC_CONTROLLER_FAILURES,
    capacity_check,
    max_controller_failures,
    num_workers,
    ray_train_variables,
    report_workers,
)
from tests.screen import Screen

FIXED, RANGE = ClusterConfig(workers=2), ClusterConfig(workers=(2, 8))
START_TIMEOUT, WATCHER = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster of several nodes, and no variable of Ray Train."""
    monkeypatch.setenv("RAY_ADDRESS", "host:1")
    for name in (cluster.PRIVATE_CLUSTER_VARIABLE, START_TIMEOUT, WATCHER):
        monkeypatch.delenv(name, raising=False)


def test_ray_train_gets_a_range_on_a_cluster_whose_nodes_change(monkeypatch: pytest.MonkeyPatch):
    """A private cluster stays as it is, so there the number is fixed before training."""
    assert (num_workers(FIXED), num_workers(RANGE)) == (2, (2, 8))
    assert max_controller_failures(FIXED) == MAX_CONTROLLER_FAILURES
    assert max_controller_failures(RANGE) == MAX_ELASTIC_CONTROLLER_FAILURES
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setattr("stages.runtime.cluster.workers_on_cluster", lambda config: 3)
    assert num_workers(RANGE) == 3
    assert max_controller_failures(RANGE) == MAX_CONTROLLER_FAILURES


def test_range_requires_whole_processors():
    """Ray rounds fractions down in another way: it could wait forever for a worker that fits."""
    with pytest.raises(ValueError, match=r"gpus_per_worker must be a whole number if workers is a pair, got 0\.2"):
        ClusterConfig((1, 4), 1, 0.2)
    assert ClusterConfig((1, 4), 2, 0).min_workers == 1 and ClusterConfig(4, 0.5, 0.25).max_workers == 4


def test_ray_train_looks_for_preemption_except_on_a_private_cluster(monkeypatch: pytest.MonkeyPatch):
    """Variables are set for the block only, and a value of the user stays."""
    with ray_train_variables(FIXED):
        assert WATCHER not in os.environ and START_TIMEOUT not in os.environ
    with ray_train_variables(RANGE):
        assert WATCHER not in os.environ and os.environ[START_TIMEOUT] == "10"
    monkeypatch.setenv(cluster.PRIVATE_CLUSTER_VARIABLE, "1")
    with ray_train_variables(RANGE):
        assert os.environ[WATCHER] == "0" and START_TIMEOUT not in os.environ
    assert WATCHER not in os.environ
    monkeypatch.setenv(WATCHER, "1")
    with ray_train_variables(RANGE):
        assert os.environ[WATCHER] == "1"
    assert os.environ[WATCHER] == "1"


def test_training_ends_if_the_fewest_workers_have_not_fitted_for_long():
    """Ray Train would wait for nodes without end. A node that comes back in time restarts the timer."""
    now, fits = 0.0, False

    def check_resources(config: ClusterConfig) -> None:
        if not fits:
            raise UserError("2 workers need 2 CPUs; the cluster has 1.", where="cluster", fix="Add nodes.", code=3)

    check = capacity_check(RANGE, check_resources, set, lambda: now)
    now = CAPACITY_TIMEOUT_S - 1
    check()
    fits = True
    check()
    now, fits = 2 * CAPACITY_TIMEOUT_S - 2, False
    check()
    now += 2
    with pytest.raises(UserError, match="2 workers need 2 CPUs"):
        check()
    capacity_check(FIXED, check_resources, set, lambda: now)()


def test_the_number_of_workers_is_reported_when_it_changes(tmp_path: Path):
    """At the start, and after the loss or the arrival of a node."""
    context = StageContext("vqvae", "f", tmp_path, RANGE, Screen())
    for workers, previous in ((3, 0), (3, 3), (2, 3), (8, 2)):
        report_workers(workers, previous, context)
    report_workers(1, 2, replace(context, cluster=ClusterConfig(workers=(1, 2))))
    assert context.reporter.messages == [
        "Training starts with 3 workers of at most 8.",
        "Training continues with 2 workers instead of 3.",
        "Training continues with 8 workers instead of 2.",
        "Training continues with 1 worker instead of 2.",
    ]
