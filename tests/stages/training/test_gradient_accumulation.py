"""Micro-batches: the same model from any number of images per pass, in less memory."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.quantizer import BatchSlice
from stages.config import TrainConfig
from stages.errors import UserError
from stages.training import gradient_accumulation
from stages.training.checkpoint_state import MICROBATCH, TrainableModel, TrainState
from stages.training.code_batches import CodeBatch
from stages.training.distributed import DistributedContext
from stages.training.gradient_accumulation import GradientAccumulator, average_in_buckets, split_batch
from stages.training.objective import MetricSums, StepResult
from tests.stages.training.test_loop import CONFIG, IMAGES, Killed, ToyObjective, assert_equal, run

TOLERANCE = 1e-6  # absolute, of everything in a checkpoint: a few roundings of float32


class RecordingObjective(ToyObjective):
    """Records the images of each call, and whether it measures under autocast."""

    def __init__(self, capacity: int = 4, dropout: float = 0.3) -> None:
        super().__init__()
        self.network.dropout.p = dropout
        self.capacity, self.trained, self.measured, self.autocast = capacity, [], [], set()

    def forward(self, batch: Tensor, batch_slice: BatchSlice, dist: DistributedContext) -> StepResult:
        self.trained.append((batch_slice.step, batch_slice.start, len(batch)))
        if len(batch) > self.capacity:
            raise torch.OutOfMemoryError
        return super().forward(batch, batch_slice, dist)

    def measure(self, network: Any, batch: Tensor, dist: DistributedContext) -> MetricSums:
        if not network.training:
            self.measured.append(len(batch))
            self.autocast.add(torch.is_autocast_enabled("cpu"))
        return super().measure(network, batch, dist)


def config(**changes: Any) -> TrainConfig:
    return dataclasses.replace(CONFIG, **changes)


def without_microbatch(state: TrainState) -> TrainState:
    tensors = {name: tensor for name, tensor in state.tensors.items() if name != MICROBATCH}
    return dataclasses.replace(state, tensors=tensors)


@pytest.mark.parametrize("microbatch", [1, 2, 3, 4, 9])
def test_results_do_not_depend_on_the_micro_batch(tmp_path: Path, microbatch: int):
    """All tensors and curves are within the tolerance; a micro-batch of the whole batch changes no bit.

    Three of four images leave a last micro-batch of one image, which has a third of the weight.
    """

    def train(name: str, microbatch: int | None) -> TrainState:
        return run(
            tmp_path / name, config=config(microbatch=microbatch), objective=lambda: RecordingObjective(dropout=0)
        )

    unsplit, split = train("whole", None), train("split", microbatch)
    if microbatch >= CONFIG.batch_size:
        # Evaluation batches are smaller, which changes sums of validation metrics only.
        assert all(torch.equal(split.tensors[name], unsplit.tensors[name]) for name in unsplit.tensors)
    for name in unsplit.tensors:
        torch.testing.assert_close(split.tensors[name], unsplit.tensors[name], rtol=0, atol=TOLERANCE)
    for left, right in zip(unsplit.history, split.history, strict=True):
        assert left["value"] == pytest.approx(right["value"], abs=TOLERANCE)


@pytest.mark.parametrize("microbatch", [1, 3, "auto"])
def test_a_killed_run_resumes_bit_identical(tmp_path: Path, microbatch):
    """With dropout: its random numbers are a function of seed, step and first image."""
    with pytest.raises(Killed):
        run(tmp_path / "killed", 6, config=config(microbatch=microbatch))
    assert_equal(*(run(tmp_path / name, config=config(microbatch=microbatch)) for name in ("killed", "unbroken")))


def test_another_micro_batch_continues_an_interrupted_run(tmp_path: Path):
    """Whole batches, then single images, then automatic: the end is within the tolerance of an unbroken run."""

    def train(name: str, die_at: int = -1, **changes: Any) -> TrainState:
        return run(tmp_path / name, die_at, config=config(**changes), objective=lambda: RecordingObjective(dropout=0))

    for die_at, microbatch in ((5, None), (9, 1), (13, "auto"), (17, 2)):
        with pytest.raises(Killed):
            train("changing", die_at, microbatch=microbatch)
    changing, unbroken = train("changing"), train("unbroken")
    assert changing.tensors.keys() == unbroken.tensors.keys()
    for name in unbroken.tensors:
        torch.testing.assert_close(changing.tensors[name], unbroken.tensors[name], rtol=0, atol=TOLERANCE)


def test_an_automatic_micro_batch_is_halved_until_it_fits_and_kept(tmp_path: Path):
    """The step that failed is computed again: the run equals one of the size that fits, bit by bit.

    A resumed run starts with that size.
    """
    objectives = [RecordingObjective(capacity=2) for _ in range(3)]
    with pytest.raises(Killed):
        run(tmp_path / "auto", 6, config=config(microbatch="auto"), objective=lambda: objectives[0])
    state = run(tmp_path / "auto", config=config(microbatch="auto"), objective=lambda: objectives[1])
    fixed = run(tmp_path / "fixed", config=config(microbatch=2), objective=lambda: objectives[2])
    assert objectives[0].trained[:4] == [(0, 0, 4), (0, 0, 2), (0, 2, 2), (1, 0, 2)]
    assert {images for _, _, images in objectives[1].trained} == {2}
    assert state.tensors[MICROBATCH] == 2
    assert_equal(without_microbatch(state), fixed)


def test_all_ranks_halve_the_micro_batch_if_one_runs_out_of_memory():
    """This rank has enough memory, and another one has not in the first two attempts."""
    answers = iter([1.0, 1.0, 0.0])
    dist = DistributedContext(0, 2, all_reduce=lambda tensor: tensor.fill_(next(answers)))
    objective = RecordingObjective()
    gradients = GradientAccumulator(objective, config(microbatch="auto", batch_size=8), seed=0, dist=dist)
    gradients.accumulate(IMAGES[:4], 0, torch.zeros(1))
    assert gradients.size == 1
    assert [images for _, _, images in objective.trained] == [4, 2, 2, 1, 1, 1, 1]
    alone = GradientAccumulator(ToyObjective(), config(microbatch=1), seed=0, dist=DistributedContext())
    alone.accumulate(IMAGES[:4], 0, torch.zeros(1))
    # Half of the global batch is here; the gradients of failed attempts do not count.
    for left, right in zip(objective.parameters(), alone.objective.parameters(), strict=True):
        torch.testing.assert_close(2 * left.grad, right.grad)


def test_gradients_are_exchanged_in_few_collectives(monkeypatch: pytest.MonkeyPatch):
    """Buckets of 25 MiB hold all of small tensors; smaller buckets give the same averages."""
    tensors = [torch.randn(size) for size in (3, 40, 1, 50, 7)]
    tensors.append(torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last))
    expected = [tensor * 1.5 for tensor in tensors]

    def average(bucket_bytes: int) -> tuple[list[int], list[Tensor]]:
        collectives: list[int] = []

        def start_all_reduce(flat: Tensor) -> Callable[[], Any]:
            collectives.append(flat.numel())
            return lambda: flat.mul_(3)  # two other ranks: their gradients sum to twice those of this one

        averages = [tensor.clone() for tensor in tensors]
        monkeypatch.setattr(gradient_accumulation, "BUCKET_BYTES", bucket_bytes)
        average_in_buckets(averages, DistributedContext(0, 2, start_all_reduce=start_all_reduce))
        return collectives, averages

    for bucket_bytes, sizes in ((gradient_accumulation.BUCKET_BYTES, [301]), (160, [43, 51, 207])):
        collectives, averages = average(bucket_bytes)
        assert collectives == sizes
        for left, right in zip(averages, expected, strict=True):
            torch.testing.assert_close(left, right)
            assert left.stride() == right.stride()


@pytest.mark.parametrize(("microbatch", "fix"), [("auto", "a device with more memory"), (2, "Set microbatch in")])
def test_too_little_memory_is_an_error_with_a_fix(tmp_path: Path, microbatch, fix: str):
    """A single image that does not fit, and a fixed micro-batch that does not."""
    with pytest.raises(UserError, match=r"too little memory to train with [12] image") as caught:
        run(tmp_path, config=config(microbatch=microbatch), objective=lambda: RecordingObjective(capacity=0))
    assert fix in caught.value.fix and caught.value.code == 3


@pytest.mark.parametrize("task", ["measure", "apply_gradients"])
def test_too_little_memory_after_the_passes_is_an_error_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str):
    """In an evaluation, and for the state of the optimizer."""

    def fail(*arguments: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr({"measure": ToyObjective, "apply_gradients": TrainableModel}[task], task, fail)
    with pytest.raises(UserError, match="too little memory to train"):
        run(tmp_path)


def test_an_automatic_micro_batch_stays_within_the_share_of_more_ranks():
    """One rank saved 8 images; each of four ranks has a share of 2."""
    four_ranks = DistributedContext(0, 4)
    gradients = GradientAccumulator(ToyObjective(), config(microbatch="auto", batch_size=8), seed=0, dist=four_ranks)
    gradients.restore({MICROBATCH: torch.tensor(8)})
    assert gradients.size == 2


@pytest.mark.parametrize(("microbatch", "largest"), [(1, 1), (3, 3), ("auto", 2)])
def test_measured_images_per_call_are_at_most_the_micro_batch(tmp_path: Path, microbatch, largest: int):
    """All 23 images are measured, in batches of 8 that are split."""
    objective = RecordingObjective(capacity=largest)
    run(tmp_path, config=config(microbatch=microbatch), objective=lambda: objective)
    assert max(objective.measured) == largest and sum(objective.measured) == 4 * 23
    assert objective.autocast == {False}


def test_measuring_uses_the_precision_of_training(tmp_path: Path):
    """Under autocast, which halves the memory of activations."""
    objective = RecordingObjective()
    run(tmp_path, config=config(precision="bfloat16"), objective=lambda: objective)
    assert objective.autocast == {True}


@pytest.mark.parametrize("labels", [None, torch.arange(5)])
def test_batches_are_split_into_batches_of_the_same_type(labels: Tensor | None):
    """Named tuples, dicts and tensors; the last one is smaller."""
    batch = CodeBatch({"top": torch.arange(10).view(5, 2)}, labels)
    parts = list(split_batch(batch, 2))
    assert [len(part.codes["top"]) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part.codes["top"] for part in parts]), batch.codes["top"])
    if labels is not None:
        assert torch.equal(torch.cat([part.labels for part in parts]), labels)


@pytest.mark.gpu
def test_an_automatic_micro_batch_fits_the_memory_of_a_gpu(tmp_path: Path):
    """The device itself runs out of memory: a batch needs more than a limit of the allocator."""

    class LargeObjective(ToyObjective):
        def forward(self, batch: Tensor, batch_slice: BatchSlice, dist: DistributedContext) -> StepResult:
            batch = batch.to(dist.device)
            torch.empty(len(batch) * 2**28, dtype=torch.uint8, device=dist.device)  # 256 MiB per image
            loss = self.network(batch).square().mean()
            return StepResult(loss, {}, {"squared": loss[None], "images": torch.ones(1, device=dist.device)})

    device = torch.device("cuda", 0)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(0.7 * 2**30 / total, device)
    try:
        objective = LargeObjective().to(device)
        gradients = GradientAccumulator(
            objective, config(microbatch="auto"), seed=0, dist=DistributedContext(device=device)
        )
        gradients.accumulate(IMAGES[:4], 0, torch.zeros(1))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert gradients.size == 2
