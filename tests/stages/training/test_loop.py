"""The training loop without Ray: resumed runs end bit-identical, and only sums cross ranks."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.quantizer import BatchSlice
from stages.config import TrainConfig
from stages.errors import UserError
from stages.runtime import fault_injection
from stages.runtime.context import Reporter
from stages.training import loop, step_timer
from stages.training.checkpoint import Checkpoints
from stages.training.checkpoint_state import TrainState
from stages.training.distributed import CheckpointMismatch, CheckpointTimer, DistributedContext, StepVote
from stages.training.loop import TrainingLoop, TrainingStopped
from stages.training.metric_accumulator import MetricAccumulator
from stages.training.objective import MetricSums, Objective, StepResult, TrainingData
from stages.training.sampler import GlobalBatchSampler, ShuffledStream

IMAGES = torch.randn(23, 4, generator=torch.Generator().manual_seed(0))


class ToyNetwork(nn.Module):
    """A layer trained by gradients, random dropout, and a mean updated from sums."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.dropout = nn.Dropout(0.3)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(self.dropout(images - self.mean))


class ToyObjective(Objective):
    """Squared error of reconstructed vectors."""

    network: ToyNetwork

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = ToyNetwork()

    def zero_metrics(self) -> MetricSums:
        return {"squared": torch.zeros(1), "images": torch.zeros(1)}

    def forward(self, batch: Tensor, batch_slice: BatchSlice, dist: DistributedContext) -> StepResult:
        metrics = self.measure(self.network, batch, dist)
        sums = {"mean": (batch.sum(0), torch.tensor([len(batch)]))}
        return StepResult(metrics["squared"].sum() / len(batch), sums, metrics)

    def absorb(self, sums: Mapping[str, Any]) -> None:
        total, count = sums["mean"]
        self.network.mean.lerp_(total / count, 0.1)

    def measure(self, network: nn.Module, batch: Tensor, dist: DistributedContext) -> MetricSums:
        squared = (network(batch) - batch).square().mean(1).sum()
        return {"squared": squared[None], "images": torch.tensor([float(len(batch))])}

    def summarize(self, sums: MetricSums) -> dict[str, float]:
        return {"mse": (sums["squared"] / sums["images"]).item()}


class PartlyUnusedObjective(ToyObjective):
    """A network with a layer that the loss does not depend on, trainable or frozen."""

    def __init__(self, trainable: bool) -> None:
        super().__init__()
        self.network.unused = nn.Linear(2, 2).requires_grad_(trainable)


CONFIG = TrainConfig(
    steps=20, batch_size=4, ema_decay=0.9, lr_schedule="cosine", warmup_steps=3, max_grad_norm=1.0,
    log_every=2, evaluate_every=5, checkpoint_every=4, keep_checkpoints=3,
)  # fmt: skip


class Killed(Exception):
    """Simulates the end of the process."""


def toy_data(die_at: int = -1) -> TrainingData:
    """Return data that raises Killed instead of the batch of step `die_at`."""

    def training(start: int) -> Iterator[Tensor]:
        sampler = GlobalBatchSampler(ShuffledStream(23, 0), 4, range(start, 20))
        for step, samples in enumerate(sampler, start):
            if step == die_at:
                raise Killed
            yield IMAGES[[sample.image_index for sample in samples]]

    return TrainingData(training, {"validation": lambda: iter(IMAGES.split(8))})


def run(
    folder: Path,
    die_at: int = -1,
    dist: DistributedContext | None = None,
    config: TrainConfig = CONFIG,
    objective: Callable[[], Objective] = ToyObjective,
) -> TrainState:
    """Start or resume training in a folder; return the newest state."""
    checkpoints = Checkpoints(folder, "print", keep=3)
    try:
        TrainingLoop(
            objective(), toy_data(die_at), config,
            seed=0, dist=dist or DistributedContext(), checkpoints=checkpoints, reporter=Reporter(),
        ).run()  # fmt: skip
    finally:
        checkpoints.wait()
    state = checkpoints.latest()
    assert state is not None
    return state


def newest_state(folder: Path) -> TrainState:
    state = Checkpoints(folder, "print", keep=3).latest()
    assert state is not None
    return state


def save_state(folder: Path, state: TrainState) -> None:
    checkpoints = Checkpoints(folder, "print", keep=3)
    checkpoints.save(state)
    checkpoints.wait()


def stop_after(steps: int) -> DistributedContext:
    """Return a context whose stop is requested after so many steps of this process."""
    answers = iter([False] * (steps - 1) + [True])
    return DistributedContext(stop_requested=lambda: next(answers))


def assert_equal(left: TrainState, right: TrainState) -> None:
    assert left.step == right.step and left.history == right.history
    assert left.tensors.keys() == right.tensors.keys()
    for name in left.tensors:
        assert torch.equal(left.tensors[name], right.tensors[name]), name


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> TrainState:
    return run(tmp_path_factory.mktemp("unbroken"))


@pytest.mark.parametrize("die_at", [0, 1, 3, 4, 5, 6, 11, 19])
def test_a_run_killed_at_any_step_resumes_bit_identical(tmp_path: Path, unbroken: TrainState, die_at: int):
    """Weights, EMA, moments, buffers and curves equal those of an unbroken run."""
    with pytest.raises(Killed):
        run(tmp_path, die_at)
    assert_equal(run(tmp_path), unbroken)


def test_a_run_killed_several_times_resumes_bit_identical(tmp_path: Path, unbroken: TrainState):
    """Four resumes end in the state of an unbroken run."""
    for die_at in (5, 9, 13, 17):
        with pytest.raises(Killed):
            run(tmp_path, die_at)
    assert_equal(run(tmp_path), unbroken)


def test_every_tensor_of_a_checkpoint_affects_the_result(tmp_path: Path, unbroken: TrainState):
    """A change of any tensor changes the final state, so the comparisons above can fail."""
    with pytest.raises(TrainingStopped, match="step 9"):  # between two logged steps
        run(tmp_path / "original", dist=stop_after(9))
    original = newest_state(tmp_path / "original")
    for name, tensor in original.tensors.items():
        if name == "ema.module.mean":  # the EMA copies buffers, so this one is overwritten at each step
            continue
        changed = tensor + 1 if not tensor.is_floating_point() else tensor + 0.01
        folder = tmp_path / name
        save_state(folder, TrainState(original.step, {**original.tensors, name: changed}, original.history))
        state = run(folder)
        different = any(not torch.equal(state.tensors[key], unbroken.tensors[key]) for key in state.tensors)
        assert different or state.history != unbroken.history, name


def test_a_checkpoint_with_missing_or_wrong_tensors_is_refused(tmp_path: Path):
    """Each tensor missing or of another shape in turn, and one too many: training does not resume from it."""
    with pytest.raises(TrainingStopped):
        run(tmp_path / "original", dist=stop_after(5))
    original = newest_state(tmp_path / "original")
    variants = [{key: tensor for key, tensor in original.tensors.items() if key != name} for name in original.tensors]
    variants += [{**original.tensors, name: torch.zeros(7, 7, 7)} for name in original.tensors]
    for number, tensors in enumerate([*variants, {**original.tensors, "network.more": torch.zeros(1)}]):
        folder = tmp_path / str(number)
        save_state(folder, TrainState(original.step, tensors, original.history))
        with pytest.raises(UserError, match="The checkpoint of step 5 does not match this network: ") as caught:
            run(folder)
        assert caught.value.where == str(folder / "step-000000005") and caught.value.code == 5
        assert "Remove it, then run the same command again" in caught.value.fix


def test_a_trainable_parameter_without_a_gradient_is_refused_at_the_first_step(tmp_path: Path):
    """Adam has no moments of it, so no checkpoint would be complete. A frozen parameter is accepted."""
    with pytest.raises(UserError, match=r"The loss does not depend on unused\.weight") as caught:
        run(tmp_path / "trainable", objective=lambda: PartlyUnusedObjective(trainable=True))
    assert caught.value.where == "ToyNetwork" and "Use it in forward" in caught.value.fix
    with pytest.raises(Killed):
        run(tmp_path / "frozen", 9, objective=lambda: PartlyUnusedObjective(trainable=False))
    assert run(tmp_path / "frozen", objective=lambda: PartlyUnusedObjective(trainable=False)).step == 20


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 7, 8, 19])
def test_a_stop_request_saves_the_current_step(tmp_path: Path, unbroken: TrainState, steps: int):
    """No step is lost, also between two logged steps, and the resumed run ends bit-identical."""
    with pytest.raises(TrainingStopped, match=f"step {steps}"):
        run(tmp_path, dist=stop_after(steps))
    assert newest_state(tmp_path).step == steps
    assert_equal(run(tmp_path), unbroken)


def test_a_run_stopped_after_every_step_ends_bit_identical(tmp_path: Path, unbroken: TrainState):
    """Twenty runs of one step each equal one run of twenty steps."""
    for _ in range(19):
        with pytest.raises(TrainingStopped):
            run(tmp_path, dist=stop_after(1))
    assert_equal(run(tmp_path), unbroken)


def test_a_stop_request_does_not_wait_for_a_logged_step(tmp_path: Path):
    """A preempted machine has no time to reach one."""
    rarely = dataclasses.replace(CONFIG, log_every=20, checkpoint_every=20)
    with pytest.raises(TrainingStopped, match="step 3"):
        run(tmp_path, dist=stop_after(3), config=rarely)


def test_several_ranks_stop_one_step_after_a_request(tmp_path: Path):
    """The result of a vote is read with the next vote, so no rank waits for it."""
    dist = DistributedContext(world_size=2, stop_requested=iter([False, False, True, False]).__next__)
    with pytest.raises(TrainingStopped, match="step 4"):
        run(tmp_path, dist=dist)


class FakeClock:
    """Clock that moves only when a test moves it, in seconds."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def saved_steps(folder: Path, config: TrainConfig, timer: CheckpointTimer, clock: FakeClock, **dist: Any) -> list[int]:
    """Train with steps of ten seconds; return the steps of all checkpoints."""

    def take_step(step: int) -> bool:
        clock.now_s += 10
        return False

    context = DistributedContext(checkpoint_timer=timer, inject_fault=take_step, **dist)
    checkpoints = Checkpoints(folder, "print", keep=100)
    TrainingLoop(
        ToyObjective(), toy_data(), config, seed=0, dist=context, checkpoints=checkpoints, reporter=Reporter()
    ).run()
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())


def test_checkpoints_are_saved_by_time_and_by_steps(tmp_path: Path):
    """Every checkpoint begins a new interval. With several ranks, one by time comes one step after the vote."""
    clock = FakeClock()
    only_last = dataclasses.replace(CONFIG, checkpoint_every=20)
    assert saved_steps(tmp_path / "a", only_last, CheckpointTimer(60, clock), clock) == [6, 12, 18, 20]
    assert saved_steps(tmp_path / "b", only_last, CheckpointTimer(60, clock), clock, world_size=2) == [7, 14, 20]
    by_steps = dataclasses.replace(CONFIG, checkpoint_every=8)
    assert saved_steps(tmp_path / "c", by_steps, CheckpointTimer(60, clock), clock) == [6, 8, 14, 16, 20]
    assert saved_steps(tmp_path / "d", by_steps, CheckpointTimer(0, clock), clock) == [8, 16, 20]


def test_vote_to_save_is_dropped_if_a_checkpoint_was_saved_since(tmp_path: Path):
    """Several ranks read it one step later, which may be the step after a checkpoint by steps."""
    clock = FakeClock()
    every_six = dataclasses.replace(CONFIG, checkpoint_every=6)
    timer = CheckpointTimer(60, clock)
    assert saved_steps(tmp_path, every_six, timer, clock, world_size=2) == [6, 12, 18, 20]


def test_run_that_ends_between_checkpoints_by_time_resumes_bit_identical(tmp_path: Path, unbroken: TrainState):
    """No state depends on the clock."""
    clock, only_last = FakeClock(), dataclasses.replace(CONFIG, checkpoint_every=20)

    def take_step(step: int) -> bool:
        clock.now_s += 10
        return False

    def context() -> DistributedContext:
        return DistributedContext(checkpoint_timer=CheckpointTimer(30, clock), inject_fault=take_step)

    with pytest.raises(Killed):
        run(tmp_path, 11, context(), only_last)
    assert newest_state(tmp_path).step == 9
    assert_equal(run(tmp_path, dist=context(), config=only_last), unbroken)


def test_free_space_is_that_of_checkpoints_by_time(tmp_path: Path, monkeypatch):
    """There may be one after each step, so as many as are kept must fit."""
    size = sum(tensor.nbytes for tensor in run(tmp_path / "measured").tensors.values())
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=7 * size // 2))
    once = dataclasses.replace(CONFIG, checkpoint_every=20)
    run(tmp_path / "steps", config=once)
    with pytest.raises(UserError, match="too small for 4 more checkpoints"):
        run(tmp_path / "time", config=once, dist=DistributedContext(checkpoint_timer=CheckpointTimer(60)))


def test_ranks_with_different_checkpoints_do_not_start(tmp_path: Path):
    """Their gradients would be averaged without an error, over different weights."""
    with pytest.raises(Killed):
        run(tmp_path, 10)

    def all_reduce(tensor: Tensor) -> None:  # rank 0 starts at step 4
        if tensor.numel() == 2:
            tensor[0].fill_(4)

    with pytest.raises(CheckpointMismatch, match=r"must be of the same step, got steps 4, 8\."):
        run(tmp_path, dist=DistributedContext(1, 2, all_reduce=all_reduce))


def test_a_disk_too_small_for_the_checkpoints_is_refused_after_one_step(tmp_path: Path, monkeypatch):
    """The error has the needed space, the free space and the folder. A disk that is large enough is accepted."""
    size = sum(tensor.nbytes for tensor in run(tmp_path / "measured").tensors.values())
    free = SimpleNamespace(free=7 * size // 2)  # `keep` is 3, and a fourth exists while it is written
    monkeypatch.setattr("shutil.disk_usage", lambda folder: free)
    with pytest.raises(UserError, match=r"too small for 4 more checkpoints of 0\.0 MiB each") as caught:
        run(tmp_path / "run")
    assert str(tmp_path / "run") in caught.value.where and "keep_checkpoints" in caught.value.fix
    assert caught.value.code == 3 and not list((tmp_path / "run").iterdir())
    run(tmp_path / "run", config=dataclasses.replace(CONFIG, checkpoint_every=7))  # writes only three


@pytest.mark.gpu
def test_a_vote_on_a_gpu_is_read_one_step_later():
    """The result is read from the copy on the CPU, not from the device."""
    stop_requested = iter([False, True, False, False]).__next__
    timer = CheckpointTimer(10, clock=count(step=4).__next__)  # due at the third question
    dist = DistributedContext(
        world_size=2, device=torch.device("cuda"), stop_requested=stop_requested, checkpoint_timer=timer
    )
    vote = StepVote(dist)
    assert [vote.count(vote.cast()) for _ in range(4)] == [
        (False, False),
        (False, False),
        (True, False),
        (False, True),
    ]


def test_metrics_since_the_last_log_are_restored_by_fewer_and_by_more_ranks():
    """The sum over ranks stays the same for any number of ranks before and after."""
    for before in (1, 2, 4):
        rows = torch.zeros(before, 2, dtype=torch.double)
        for rank in range(before):
            accumulator = MetricAccumulator(ToyObjective(), DistributedContext(rank, before))
            accumulator.add({"squared": torch.tensor([rank + 0.5]), "images": torch.tensor([1.0])})
            rows += accumulator.gather_by_rank()
        assert rows.tolist() == [[rank + 0.5, 1] for rank in range(before)]
        for after in (1, 2, 4):
            restored = [MetricAccumulator(ToyObjective(), DistributedContext(rank, after)) for rank in range(after)]
            for accumulator in restored:
                accumulator.restore(rows)
            assert torch.equal(sum(accumulator.local for accumulator in restored), rows.sum(0))
            if after == before:
                assert all(torch.equal(restored[rank].local, rows[rank]) for rank in range(after))


@pytest.mark.parametrize(("fault", "error"), [("raise", RuntimeError), ("full", UserError), ("nan", UserError)])
def test_an_injected_fault_happens_once_and_the_run_resumes_bit_identical(
    tmp_path: Path, unbroken: TrainState, monkeypatch: pytest.MonkeyPatch, fault: str, error: type[Exception]
):
    """The same command continues from the newest checkpoint without the fault."""
    monkeypatch.setenv(fault_injection.FAULT_VARIABLE, f"{fault}@toy:0:9")
    dist = DistributedContext(inject_fault=lambda step: fault_injection.inject_faults("toy", 0, step, tmp_path))
    with pytest.raises(error):
        run(tmp_path, dist=dist)
    # The full disk may hit the checkpoint of step 8, which is written in the background.
    assert newest_state(tmp_path).step in ((4, 8) if fault == "full" else (8,))
    assert_equal(run(tmp_path, dist=dist), unbroken)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path):
    """The message has the metric and the step."""
    diverging = TrainConfig(steps=20, batch_size=4, learning_rate=1e30, log_every=2, checkpoint_every=4)
    with pytest.raises(UserError, match=r"mse must be finite, got .* at step"):
        run(tmp_path, config=diverging)


def test_metrics_of_speed_come_with_each_log_entry(tmp_path: Path):
    """The curves that a result keeps have none of them: they differ from run to run."""
    rows: list[dict[str, float]] = []

    class SpeedRecorder(Reporter):
        def metrics(self, values: Mapping[str, float], step: int) -> None:
            rows.extend([dict(values)] if "train/images_per_second" in values else [])

    dist = DistributedContext(flops_per_image=1e12)
    checkpoints = Checkpoints(tmp_path, "print", keep=3)
    TrainingLoop(
        ToyObjective(), toy_data(), CONFIG, seed=0, dist=dist, checkpoints=checkpoints, reporter=SpeedRecorder()
    ).run()
    assert len(rows) == 10
    for row in rows:
        assert sum(row[f"train/{part}_seconds"] for part in ("data", "compute", "reduce")) > 0
        assert row["train/reduce_seconds"] == 0  # one rank waits for no other
        assert row["train/peak_memory_megabytes"] > 10 and "train/model_flops_utilization" not in row
        assert row["train/model_tflops_per_second"] == pytest.approx(3 * row["train/images_per_second"])
    names = {str(entry["name"]) for entry in newest_state(tmp_path).history}
    assert not [name for name in names if "second" in name or "memory" in name]


def test_images_per_second_exclude_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An evaluation between two logged steps does not change the rate."""
    clock, rates = [0.0], []

    def after(seconds: float, batch: Tensor) -> Tensor:
        clock[0] += seconds
        return batch

    class RateRecorder(Reporter):
        def metrics(self, values: Mapping[str, float], step: int) -> None:
            rates.extend(value for name, value in values.items() if name == "train/images_per_second")

    for module in (loop, step_timer):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    data = TrainingData(
        lambda start: (after(1, IMAGES[:4]) for _ in range(start, 20)),
        {"validation": lambda: (after(100, images) for images in IMAGES.split(8))},
    )
    TrainingLoop(
        ToyObjective(), data, CONFIG,
        seed=0, dist=DistributedContext(), checkpoints=Checkpoints(tmp_path, "print", keep=3), reporter=RateRecorder(),
    ).run()  # fmt: skip
    assert rates == [4.0] * 10
