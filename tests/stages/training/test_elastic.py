"""One, two or four ranks train the same model. The ranks are gloo processes on one machine, without Ray."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from stages import prior, vqvae
from stages.config import ClusterConfig, PriorStageConfig
from stages.runtime.context import StageContext
from stages.training.checkpoint import Checkpoints
from stages.training.checkpoint_state import METRICS_SINCE_LOG, MICROBATCH, TrainState
from stages.training.distributed import DistributedContext
from tests.gloo import train_with_ranks

TOLERANCE = 1e-6  # absolute, of weights, codebooks, moments and curves after 12 steps: a few roundings of float32
TRAIN_WORKERS = {"vqvae": vqvae.train_worker, "top": prior.train_worker}


def train(folder: Path, stage: str, arguments: dict[str, Any], world_size: int, stop_after: int = 0) -> TrainState:
    """Start or resume training with `world_size` ranks; return the newest state."""
    folder.mkdir(exist_ok=True)
    context = StageContext(stage, "print", folder, ClusterConfig())
    train_with_ranks(TRAIN_WORKERS[stage], arguments, context, world_size=world_size, stop_after=stop_after)
    state = Checkpoints(folder, "print", keep=9).latest()
    assert state is not None
    return state


def train_alone(folder: Path, stage: str, arguments: dict[str, Any]) -> TrainState:
    """Train with a single rank in this process; return the newest state."""
    context = StageContext(stage, "print", folder, ClusterConfig())
    TRAIN_WORKERS[stage](dist=DistributedContext(), context=context, **arguments)
    state = Checkpoints(folder, "print", keep=9).latest()
    assert state is not None
    return state


@pytest.fixture(scope="module")
def arguments(project) -> dict[str, dict[str, Any]]:
    """Inputs and settings of each stage. Without dropout in the prior, whose random numbers differ between ranks."""
    network = dataclasses.replace(project.priors["top"], dropout=0.0, label_dropout=0.0)
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


def max_difference(left: TrainState, right: TrainState) -> float:
    """Return the largest absolute difference between the tensors and between the curves of two states."""
    assert left.step == right.step
    names = [name for name in left.tensors if name not in (METRICS_SINCE_LOG, MICROBATCH)]
    weights = max((left.tensors[name].double() - right.tensors[name].double()).abs().max().item() for name in names)
    curves = max(abs(a["value"] - b["value"]) for a, b in zip(left.history, right.history, strict=True))
    return max(weights, curves)


@pytest.fixture(scope="module")
def single(arguments, tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainState]:
    """State of each stage after training with a single rank."""
    folder = tmp_path_factory.mktemp("single")
    return {stage: train_alone(folder / stage, stage, arguments[stage]) for stage in TRAIN_WORKERS}


@pytest.mark.parametrize(
    ("stage", "world_size"), [("vqvae", 2), pytest.param("vqvae", 4, marks=pytest.mark.slow), ("top", 2)]
)
def test_more_ranks_train_the_same_model(
    tmp_path: Path, arguments, single: dict[str, TrainState], stage: str, world_size: int
):
    """Only the order of summation differs, so weights and curves are within the tolerance."""
    assert max_difference(train(tmp_path, stage, arguments[stage], world_size), single[stage]) < TOLERANCE


def test_ranks_with_unequal_shares_train_the_same_model(tmp_path: Path, arguments):
    """Three ranks share 16 images as 5, 5 and 6: gradients are weighted by the numbers of images."""
    config = dataclasses.replace(arguments["vqvae"]["train_vqvae"], batch_size=16)
    settings = arguments["vqvae"] | {"train_vqvae": config}
    single = train_alone(tmp_path / "single", "vqvae", settings)
    assert max_difference(train(tmp_path / "shared", "vqvae", settings, 3), single) < TOLERANCE


@pytest.mark.parametrize("stage", TRAIN_WORKERS)
@pytest.mark.parametrize("microbatch", [1, 2, 4])
def test_micro_batches_train_the_same_model(
    tmp_path: Path, arguments, single: dict[str, TrainState], stage: str, microbatch: int
):
    """Codebooks learn from the same sums, and dropped levels, candidates and losses are those of the whole batch."""
    state = train_alone(tmp_path, stage, with_settings(stage, arguments[stage], microbatch=microbatch))
    assert max_difference(state, single[stage]) < TOLERANCE


def test_two_ranks_with_automatic_micro_batches_train_the_same_model(
    tmp_path: Path, arguments, single: dict[str, TrainState]
):
    """The ranks average their gradients without DDP, which cannot compute a step again."""
    settings = with_settings("vqvae", arguments["vqvae"], microbatch="auto")
    assert max_difference(train(tmp_path, "vqvae", settings, 2), single["vqvae"]) < TOLERANCE


@pytest.mark.parametrize("stage", TRAIN_WORKERS)
def test_recomputed_activations_change_no_bit(tmp_path: Path, arguments, single: dict[str, TrainState], stage: str):
    """Weights, moments, codebooks and curves."""
    state = train_alone(tmp_path, stage, with_settings(stage, arguments[stage], recompute_activations=True))
    assert state.history == single[stage].history
    assert all(torch.equal(state.tensors[name], tensor) for name, tensor in single[stage].tensors.items())


def with_settings(stage: str, arguments: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """Return a stage's arguments with other settings of its training."""
    if stage == "vqvae":
        return arguments | {"train_vqvae": dataclasses.replace(arguments["train_vqvae"], **settings)}
    prior = arguments["prior"]
    return arguments | {"prior": dataclasses.replace(prior, train=dataclasses.replace(prior.train, **settings))}


def test_one_or_two_ranks_resume_what_two_ranks_began(tmp_path: Path, arguments, single: dict[str, TrainState]):
    """Stopped between two logged steps: two ranks end bit-identical to two unbroken ones, one within the tolerance."""
    settings = arguments["vqvae"]
    stopped = train(tmp_path / "stopped", "vqvae", settings, 2, stop_after=4)
    assert stopped.step == 5  # requested after the fourth step, agreed on after the fifth
    shutil.copytree(tmp_path / "stopped", tmp_path / "one")
    assert max_difference(train(tmp_path / "one", "vqvae", settings, 1), single["vqvae"]) < TOLERANCE
    resumed, unbroken = (train(tmp_path / name, "vqvae", settings, 2) for name in ("stopped", "unbroken"))
    assert resumed.history == unbroken.history
    assert all(torch.equal(resumed.tensors[name], unbroken.tensors[name]) for name in unbroken.tensors)
