"""One, two or four workers learn the same: gloo processes stand for machines, and nothing stands for Ray."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn

from stages import prior, vqvae
from stages.config import ClusterConfig, PriorStageConfig
from stages.runtime.context import StageContext
from stages.training.checkpoint import Checkpoints, State
from stages.training.loop import Stopped, Worker
from tests.gloo import together

BOUND = 1e-6  # on weights, codebooks, moments and curves after 12 steps: a few roundings of float32
LEARN = {"vqvae": vqvae.train_worker, "top": prior.train_worker}


def work(rank: int, count: int, folder: Path, stage: str, arguments: dict[str, Any], stop_at: int) -> None:
    """Be one of `count` workers; be asked to stop after a step, unless that is 0."""
    answers = iter([False] * (stop_at - 1) + [True] * 99) if stop_at else iter([False] * 99)
    worker = Worker(
        rank,
        count,
        reduce=distributed.all_reduce,
        wrap=lambda module: nn.parallel.DistributedDataParallel(module, broadcast_buffers=False),
        stopping=answers.__next__,
    )
    try:
        LEARN[stage](worker=worker, context=StageContext(stage, "print", folder, ClusterConfig()), **arguments)
    except Stopped:
        assert stop_at


def train_or_load(folder: Path, stage: str, arguments: dict[str, Any], workers: int, stop_at: int = 0) -> State:
    """Train, or go on, with some workers; return the state they leave."""
    folder.mkdir(exist_ok=True)
    together(work, workers, folder, stage, arguments, stop_at, count=workers)
    state = Checkpoints(folder, "print", keep=9).latest()
    assert state is not None
    return state


@pytest.fixture(scope="module")
def arguments(project) -> dict[str, dict[str, Any]]:
    """What each stage learns from and how; dropout alone is missing, which each worker draws for itself."""
    network = dataclasses.replace(project.priors["top"], dropout=0.0)
    return {
        "vqvae": {
            "shards": project.path("shards"),
            "vqvae": dataclasses.replace(project.network, level_dropout=0.5),
            "augment": project.augment,
            "train_vqvae": project.train,
            "seed": 0,
        },
        "top": {
            "level": "top",
            "codes": project.path("codes"),
            "prior": PriorStageConfig(network, project.train),
            "seed": 0,
        },
    }


def far(left: State, right: State) -> float:
    """The largest difference between two states, and between their curves."""
    assert left.step == right.step
    names = [name for name in left.tensors if name != "since"]
    weights = max((left.tensors[name].double() - right.tensors[name].double()).abs().max().item() for name in names)
    curves = max(abs(a["value"] - b["value"]) for a, b in zip(left.history, right.history, strict=True))
    return max(weights, curves)


@pytest.fixture(scope="module")
def alone(arguments, tmp_path_factory: pytest.TempPathFactory) -> dict[str, State]:
    """What one worker makes of each."""
    folder = tmp_path_factory.mktemp("alone")
    return {stage: train_or_load(folder / stage, stage, arguments[stage], 1) for stage in LEARN}


@pytest.mark.parametrize(("stage", "workers"), [("vqvae", 2), ("vqvae", 4), ("top", 2)])
def test_more_workers_learn_what_one_does(tmp_path: Path, arguments, alone: dict[str, State], stage: str, workers: int):
    """Sums are added up in another order, and nothing else differs: weights and curves lie within the bound."""
    assert far(train_or_load(tmp_path, stage, arguments[stage], workers), alone[stage]) < BOUND


def test_what_two_workers_began_one_or_two_can_finish(tmp_path: Path, arguments, alone: dict[str, State]):
    """Stopped between two steps that are logged: two end in the bits of two unbroken ones, one within the bound."""
    given = arguments["vqvae"]
    begun = train_or_load(tmp_path / "begun", "vqvae", given, 2, stop_at=4)
    assert begun.step == 5  # asked after the fourth, agreed on after the fifth
    shutil.copytree(tmp_path / "begun", tmp_path / "one")
    assert far(train_or_load(tmp_path / "one", "vqvae", given, 1), alone["vqvae"]) < BOUND
    again, unbroken = (train_or_load(tmp_path / name, "vqvae", given, 2) for name in ("begun", "unbroken"))
    assert again.history == unbroken.history
    assert all(torch.equal(again.tensors[name], unbroken.tensors[name]) for name in unbroken.tensors)
