"""Training with a range of workers, on a cluster of simulated nodes that loses nodes or gets another one."""

import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
from ray import _raylet
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION

from models.vqvae import VQVAE
from stages import vqvae
from stages.cluster_config import ClusterConfig
from stages.runtime.cluster import _keep_sigterm_handler, _patient_start
from stages.runtime.context import StageContext
from stages.training.checkpoint import Checkpoints
from stages.training.checkpoint_state import TrainState
from stages.training.distributed import DistributedContext
from stages.training.ray_train import train_or_load
from tests.mini_pipeline import MiniPipeline
from tests.screen import Screen
from tests.stages.training.test_elastic import TOLERANCE, max_difference

NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 100_000_000}
NOTICE_S = 8.0  # between the announcement of a preemption and the end of the node


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Head and two other nodes with one CPU each, which this machine simulates."""
    head = NODE | {"include_dashboard": False}
    cluster = Cluster()
    try:
        with _patient_start(), _keep_sigterm_handler():
            for node in (head, NODE, NODE):
                cluster.add_node(**node)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
        yield cluster
    finally:
        cluster.shutdown()


class LosesNodes(Screen):
    """Kills a node after step 6, and announces the preemption of the other one after step 8."""

    def __init__(self, nodes: Cluster) -> None:
        super().__init__()
        self.nodes = nodes
        self.lost, self.preempted = sorted(nodes.worker_nodes, key=lambda node: node.unique_id)
        self.is_announced = False

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        if step == 6 and self.lost in self.nodes.worker_nodes:
            self.nodes.remove_node(self.lost, allow_graceful=False)
        if step == 8 and not self.is_announced:
            self.is_announced = True
            end_ms = int((time.time() + NOTICE_S) * 1000)
            client = _raylet.GcsClient(address=self.nodes.address)
            client.drain_node(self.preempted.node_id, DRAIN_NODE_REASON_PREEMPTION, "test", end_ms)
            Timer(NOTICE_S + 1, self.nodes.remove_node, [self.preempted], {"allow_graceful": False}).start()


class AddsNode(Screen):
    """Adds a node after step 2."""

    def __init__(self, nodes: Cluster) -> None:
        super().__init__()
        self.nodes, self.is_added = nodes, False

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        if step == 2 and not self.is_added:
            self.is_added = True
            self.nodes._shutdown_at_exit = False  # needs signal handlers, which only the main thread can set
            self.nodes.add_node(wait=False, **NODE)


@dataclass(frozen=True)
class Trainings:
    """Trainings of the same model: alone in this process, and on a cluster with one to three workers."""

    arguments: dict[str, Any]
    folder: Path

    def context(self, name: str) -> StageContext:
        (self.folder / name).mkdir()
        return StageContext("vqvae", "f", self.folder / name, ClusterConfig())

    def alone(self) -> TrainState:
        context = self.context("alone")
        vqvae.train_worker(dist=DistributedContext(), context=context, **self.arguments)
        return self.newest(context)

    def elastic(self, reporter: Screen) -> TrainState:
        config = ClusterConfig(workers=(1, 3), cpus_per_worker=1, max_failures=1)
        context = replace(self.context("elastic"), cluster=config, reporter=reporter)
        network = VQVAE(self.arguments["vqvae"])
        train_or_load(
            vqvae.train_worker, self.arguments, self.arguments["train_vqvae"], network=network, context=context
        )
        return self.newest(context)

    def newest(self, context: StageContext) -> TrainState:
        state = Checkpoints(context.work_dir, "f", keep=9).latest()
        assert state
        return state


@pytest.fixture
def trainings(project: MiniPipeline, tmp_path: Path) -> Trainings:
    arguments = {
        "shards": project.path("shards"),
        "vqvae": project.network,
        "augment": project.augment,
        "train_vqvae": project.train,
        "seed": 0,
    }
    return Trainings(arguments, tmp_path)


def messages_of_training(screen: Screen) -> list[str]:
    return [message for message in screen.messages if not message.startswith("Worker ")]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_training_continues_with_fewer_workers_after_a_loss_and_a_preemption(
    trainings: Trainings, nodes: Cluster, monkeypatch: pytest.MonkeyPatch
):
    """Three workers start and one ends, with the weights and curves of a single one. A preemption is no failure."""
    alone = trainings.alone()
    # Each slow step takes 5 s, so that nodes are lost before the end.
    monkeypatch.setenv("VQVAE2_FAULT", ",".join(f"slow@vqvae:0:{step}" for step in (7, 9, 10, 11)))
    screen = LosesNodes(nodes)
    elastic = trainings.elastic(screen)
    assert messages_of_training(screen) == [
        "Training starts with 3 workers of at most 3.",
        "Training continues with 2 workers instead of 3.",
        "Resuming at step 4 of 12.",
        "Training continues with 1 worker instead of 2.",
        "Resuming at step 8 of 12.",
    ]
    assert max_difference(elastic, alone) < TOLERANCE


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_training_continues_with_more_workers_on_a_new_node(
    trainings: Trainings, nodes: Cluster, monkeypatch: pytest.MonkeyPatch
):
    """Two workers start and three end, with the weights and curves of a single one."""
    longer = replace(trainings.arguments["train_vqvae"], steps=30)
    trainings = replace(trainings, arguments=trainings.arguments | {"train_vqvae": longer})
    alone = trainings.alone()
    nodes.remove_node(min(nodes.worker_nodes, key=lambda node: node.unique_id))
    # Ray Train looks for new nodes once a minute.
    monkeypatch.setenv("VQVAE2_FAULT", ",".join(f"slow@vqvae:0:{step}" for step in range(3, 30)))
    screen = AddsNode(nodes)
    elastic = trainings.elastic(screen)
    first, second, resumed = messages_of_training(screen)
    assert first == "Training starts with 2 workers of at most 3."
    assert second == "Training continues with 3 workers instead of 2."
    (step,) = re.findall(r"^Resuming at step (\d+) of 30\.$", resumed)
    assert int(step) % 4 == 0 and int(step) >= 8  # Ray Train looks after a minute, and each step takes 5 s
    assert max_difference(elastic, alone) < TOLERANCE
