"""The training loop, without Ray: it resumes to the same bits, and only sums cross workers."""

import dataclasses
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from stages.config import TrainConfig
from stages.errors import UserError
from stages.runtime import fault_injection
from stages.runtime.context import Reporter
from stages.training import loop
from stages.training.checkpoint import Checkpoints, State
from stages.training.loop import (
    CheckpointMismatch,
    Data,
    MetricSums,
    Objective,
    Step,
    Stopped,
    Worker,
    learning_rate,
    train,
)
from stages.training.sampler import GlobalBatchSampler, ShuffledStream

IMAGES = torch.randn(23, 4, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    """A layer that learns by gradients, dropout that draws, and a mean that learns by sums."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.dropout = nn.Dropout(0.3)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(self.dropout(images - self.mean))


class Toy(Objective):
    """Reconstruct vectors."""

    network: Network

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = Network()

    def zeros(self) -> MetricSums:
        return {"squared": torch.zeros(1), "images": torch.zeros(1)}

    def forward(self, batch: Tensor, step: int, worker: Worker) -> Step:
        totals = self.measure(self.network, batch, worker)
        return Step(totals["squared"].sum() / len(batch), [batch.sum(0), torch.tensor([len(batch)])], totals)

    def absorb(self, sums: list[Tensor]) -> None:
        self.network.mean.lerp_(sums[0] / sums[1], 0.1)

    def measure(self, network: nn.Module, batch: Tensor, worker: Worker) -> MetricSums:
        squared = (network(batch) - batch).square().mean(1).sum()
        return {"squared": squared[None], "images": torch.tensor([float(len(batch))])}

    def summarize(self, totals: MetricSums) -> dict[str, float]:
        return {"mse": (totals["squared"] / totals["images"]).item()}


CONFIG = TrainConfig(
    steps=20, batch_size=4, ema_decay=0.9, lr_schedule="cosine", warmup_steps=3, max_grad_norm=1.0,
    log_every=2, evaluate_every=5, checkpoint_every=4, keep_checkpoints=3,
)  # fmt: skip


class Killed(Exception):
    """Stands for a process that dies."""


def data(die_at: int = -1) -> Data:
    def steps(start: int) -> Iterator[Tensor]:
        for number, picks in enumerate(
            GlobalBatchSampler(ShuffledStream(23, 0), 4, start=start, stop=20, rank=0, workers=1), start
        ):
            if number == die_at:
                raise Killed
            yield IMAGES[[pick.image for pick in picks]]

    return Data(steps, {"validation": lambda: iter(IMAGES.split(8))})


def run(folder: Path, die_at: int = -1, worker: Worker = Worker(), config: TrainConfig = CONFIG) -> State:  # noqa: B008
    checkpoints = Checkpoints(folder, "print", keep=3)
    try:
        train(Toy(), data(die_at), config, seed=0, worker=worker, checkpoints=checkpoints, reporter=Reporter())
    finally:
        checkpoints.wait()
    state = checkpoints.latest()
    assert state is not None
    return state


def stopped_after(steps: int) -> Worker:
    """Be asked to stop once so many steps are made."""
    answers = iter([False] * (steps - 1) + [True])
    return Worker(stopping=lambda: next(answers))


def assert_equal(left: State, right: State) -> None:
    assert left.step == right.step and left.history == right.history
    assert left.tensors.keys() == right.tensors.keys()
    for name in left.tensors:
        assert torch.equal(left.tensors[name], right.tensors[name]), name


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> State:
    return run(tmp_path_factory.mktemp("unbroken"))


@pytest.mark.parametrize("die_at", [0, 1, 3, 4, 5, 6, 11, 19])
def test_a_run_killed_at_any_step_ends_in_the_bits_of_an_unbroken_one(tmp_path: Path, unbroken: State, die_at: int):
    """Weights, averages, moments, learnt sums and curves are equal, not close."""
    with pytest.raises(Killed):
        run(tmp_path, die_at)
    assert_equal(run(tmp_path), unbroken)


def test_a_run_killed_again_and_again_ends_in_the_same_bits(tmp_path: Path, unbroken: State):
    """Twice resumed is once resumed."""
    for die_at in (5, 9, 13, 17):
        with pytest.raises(Killed):
            run(tmp_path, die_at)
    assert_equal(run(tmp_path), unbroken)


def test_every_part_of_the_state_matters(tmp_path: Path, unbroken: State):
    """Change any tensor of a checkpoint and the end differs: the equality above is able to fail."""
    with pytest.raises(Stopped, match="step 9"):  # between two steps that are logged
        run(tmp_path / "origin", worker=stopped_after(9))
    origin = Checkpoints(tmp_path / "origin", "print", keep=3).latest()
    assert origin is not None
    for name, tensor in origin.tensors.items():
        if name == "averaged.module.mean":  # a copy of network.mean, made anew each step
            continue
        changed = tensor + 1 if not tensor.is_floating_point() else tensor + 0.01
        folder = tmp_path / name
        checkpoints = Checkpoints(folder, "print", keep=3)
        checkpoints.save(State(origin.step, {**origin.tensors, name: changed}, origin.history))
        checkpoints.wait()
        end = run(folder)
        different = any(not torch.equal(end.tensors[key], unbroken.tensors[key]) for key in end.tensors)
        assert different or end.history != unbroken.history, name


def test_a_checkpoint_that_lacks_something_is_refused(tmp_path: Path):
    """Each tensor in turn, in its absence and in another shape, and one too many: none is begun anew unsaid."""
    with pytest.raises(Stopped):
        run(tmp_path / "origin", worker=stopped_after(5))
    origin = Checkpoints(tmp_path / "origin", "print", keep=3).latest()
    assert origin is not None
    inject_nan = [{key: tensor for key, tensor in origin.tensors.items() if key != name} for name in origin.tensors]
    inject_nan += [{**origin.tensors, name: torch.zeros(7, 7, 7)} for name in origin.tensors]
    for number, tensors in enumerate([*inject_nan, {**origin.tensors, "network.more": torch.zeros(1)}]):
        folder = tmp_path / str(number)
        checkpoints = Checkpoints(folder, "print", keep=3)
        checkpoints.save(State(origin.step, tensors, origin.history))
        checkpoints.wait()
        with pytest.raises(UserError, match="The checkpoint of step 5 is not of this network: ") as caught:
            run(folder)
        assert caught.value.where == str(folder / "step-000000005") and caught.value.code == 5
        assert "Remove it, then run the same command again" in caught.value.fix


class Idle(Toy):
    """A network with a part that is never used, or is not to learn."""

    def __init__(self, learns: bool) -> None:
        super().__init__()
        self.network.idle = nn.Linear(2, 2).requires_grad_(learns)


def test_a_part_of_a_network_that_is_never_used_is_refused_at_the_first_step(tmp_path: Path, monkeypatch):
    """Adam keeps nothing of it, so that no checkpoint would ever be whole; what is not to learn needs nothing."""
    monkeypatch.setitem(globals(), "Toy", lambda: Idle(learns=True))
    with pytest.raises(UserError, match=r"The network's idle\.weight has no part in the loss\.") as caught:
        run(tmp_path / "idle")
    assert caught.value.where == "Network" and "Use it in forward" in caught.value.fix
    monkeypatch.setitem(globals(), "Toy", lambda: Idle(learns=False))
    with pytest.raises(Killed):
        run(tmp_path / "frozen", 9)
    assert run(tmp_path / "frozen").step == 20


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 7, 8, 19])
def test_a_run_asked_to_stop_saves_at_that_step_and_goes_on_from_it(tmp_path: Path, unbroken: State, steps: int):
    """No step is lost, also between two that are logged, and the curves show no seam."""
    with pytest.raises(Stopped, match=f"step {steps}"):
        run(tmp_path, worker=stopped_after(steps))
    saved = Checkpoints(tmp_path, "print", keep=3).latest()
    assert saved is not None and saved.step == steps
    assert_equal(run(tmp_path), unbroken)


def test_a_run_stopped_at_every_step_ends_in_the_same_bits(tmp_path: Path, unbroken: State):
    """Twenty runs of one step each are one run of twenty steps."""
    for _ in range(19):
        with pytest.raises(Stopped):
            run(tmp_path, worker=stopped_after(1))
    assert_equal(run(tmp_path), unbroken)


def test_a_run_that_is_asked_to_stop_does_not_wait_for_a_step_that_is_logged(tmp_path: Path):
    """However seldom that is: a machine that is taken away does not wait either."""
    seldom = dataclasses.replace(CONFIG, log_every=20, checkpoint_every=20)
    with pytest.raises(Stopped, match="step 3"):
        run(tmp_path, worker=stopped_after(3), config=seldom)


def test_several_workers_agree_to_stop_one_step_after_one_was_asked(tmp_path: Path):
    """The answer to a question comes with the next, so that nobody waits for it."""
    others = Worker(count=2, stopping=iter([False, False, True, False]).__next__)
    with pytest.raises(Stopped, match="step 4"):
        run(tmp_path, worker=others)


def test_workers_that_find_different_checkpoints_do_not_begin(tmp_path: Path):
    """Their sums would line up, and the result would be nobody's."""
    with pytest.raises(Killed):
        run(tmp_path, 10)
    others = Worker(1, 2, reduce=lambda tensor: tensor[0].fill_(4) if tensor.numel() == 2 else None)
    with pytest.raises(CheckpointMismatch, match=r"of steps 4, 8\."):
        run(tmp_path, worker=others)


def test_a_disk_too_small_for_the_checkpoints_is_refused_after_one_step(tmp_path: Path, monkeypatch):
    """With what is needed, what is free and where; what fits is let be."""
    size = sum(tensor.nbytes for tensor in run(tmp_path / "measured").tensors.values())
    free = SimpleNamespace(free=7 * size // 2)  # three are kept beside the one that is written
    monkeypatch.setattr("shutil.disk_usage", lambda folder: free)
    with pytest.raises(UserError, match=r"too small for checkpoints: 4 more, of 0\.0 MiB each") as caught:
        run(tmp_path / "run")
    assert str(tmp_path / "run") in caught.value.where and "keep_checkpoints" in caught.value.fix
    assert caught.value.code == 3 and not list((tmp_path / "run").iterdir())
    run(tmp_path / "run", config=dataclasses.replace(CONFIG, checkpoint_every=7))  # three are all that come


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing can arrive from it late")
def test_the_answer_of_a_gpu_comes_one_step_later_too():
    """Read from where it was copied to, not from the device."""
    stop = loop._Stop(Worker(count=2, device=torch.device("cuda"), stopping=iter([False, True, False]).__next__))
    assert [stop.agreed() for _ in range(3)] == [False, False, True]


def test_sums_since_the_last_log_are_taken_up_by_fewer_and_by_more_workers():
    """Nothing is lost and nothing is counted twice, whatever the number of workers before and after."""
    for before in (1, 2, 4):
        rows = torch.zeros(before, 2, dtype=torch.double)
        for rank in range(before):
            sums = loop._Sums(Toy(), Worker(rank, before))
            sums.add({"squared": torch.tensor([rank + 0.5]), "images": torch.tensor([1.0])})
            rows += sums.gather_by_rank()
        assert rows.tolist() == [[rank + 0.5, 1] for rank in range(before)]
        for after in (1, 2, 4):
            again = [loop._Sums(Toy(), Worker(rank, after)) for rank in range(after)]
            for sums in again:
                sums.restore(rows)
            assert torch.equal(sum(sums.own for sums in again), rows.sum(0))
            if after == before:
                assert all(torch.equal(sums.own, row) for sums, row in zip(again, rows, strict=True))


@pytest.mark.parametrize(("fault", "error"), [("raise", RuntimeError), ("full", UserError), ("nan", UserError)])
def test_a_fault_that_was_asked_for_comes_once_and_leaves_no_trace(
    tmp_path: Path, unbroken: State, monkeypatch: pytest.MonkeyPatch, fault: str, error: type[Exception]
):
    """The same command then goes on from the newest checkpoint, and ends in the same bits."""
    monkeypatch.setenv(fault_injection.VARIABLE, f"{fault}@toy:0:9")
    falling = Worker(fault=lambda step: fault_injection.at("toy", 0, step, tmp_path))
    with pytest.raises(error):
        run(tmp_path, worker=falling)
    newest = Checkpoints(tmp_path, "print", keep=3).latest()
    # A disk may be full while the checkpoint of step 8 is still being written.
    assert newest is not None and newest.step in ((4, 8) if fault == "full" else (8,))
    assert_equal(run(tmp_path, worker=falling), unbroken)


def test_a_loss_that_is_not_finite_ends_the_run_with_the_last_good_state(tmp_path: Path):
    """The message names the number and the step; the state before stays."""
    with pytest.raises(UserError, match=r"mse became .* by step"):
        bad = TrainConfig(steps=20, batch_size=4, learning_rate=1e30, log_every=2, checkpoint_every=4)
        run(tmp_path, config=bad)


def test_images_per_second_are_those_of_training_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A measurement in the middle of a stretch of steps makes it neither slower nor faster."""
    now, rates = [0.0], []

    def after(seconds: float, value: Tensor) -> Tensor:
        now[0] += seconds
        return value

    class Rates(Reporter):
        def metrics(self, values: Mapping[str, float], step: int) -> None:
            rates.extend(value for name, value in values.items() if name == "images_per_second")

    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: now[0]))
    timed = Data(
        lambda start: (after(1, IMAGES[:4]) for _ in range(start, 20)),
        {"validation": lambda: (after(100, images) for images in IMAGES.split(8))},
    )
    checkpoints = Checkpoints(tmp_path, "print", keep=3)
    train(Toy(), timed, CONFIG, seed=0, worker=Worker(), checkpoints=checkpoints, reporter=Rates())
    assert rates == [4.0] * 10


def test_the_rate_rises_then_falls_to_zero():
    """Linear warm-up, half a cosine, as the steps say."""
    rates = [learning_rate(CONFIG, step) for step in range(20)]
    assert rates[:3] == pytest.approx([1e-4, 2e-4, 3e-4])
    assert all(later < earlier for earlier, later in pairwise(rates[3:]))
    assert rates[-1] < 0.02 * CONFIG.learning_rate
