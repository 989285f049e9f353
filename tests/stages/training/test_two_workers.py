"""Two processes train the VQ-VAE as one does, with the stage's own objective and loop."""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed

from models.config import LevelConfig, QuantizerConfig, VQVAEConfig
from models.vqvae import VQVAE
from stages.config import TrainConfig
from stages.errors import UserError
from stages.runtime.context import Reporter
from stages.training.checkpoint import Checkpoints
from stages.training.distributed import CheckpointTimer, DistributedContext, start_all_reduce, wrap_ddp
from stages.training.loop import TrainingLoop, TrainingStopped
from stages.training.objective import TrainingData
from stages.training.sampler import GlobalBatchSampler, ShuffledStream
from stages.vqvae import VQVAEObjective
from tests.gloo import run_ranks

IMAGES = torch.randint(0, 256, (11, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
VALIDATION = IMAGES[:5]  # three for one rank, two for the other, and a smaller last batch
PREVIEWED = IMAGES[:2].numpy()
MODEL = VQVAEConfig(
    {name: LevelConfig(stride, 8, 4, 1, entries=16, dim=4) for name, stride in (("top", 8), ("bottom", 4))},
    QuantizerConfig(decay=0.9, revive_every=3, revive_below=0.5),
)
CONFIG = TrainConfig(steps=7, batch_size=4, learning_rate=1e-4, log_every=1, evaluate_every=2, checkpoint_every=7)


# Names of the metrics that describe speed.
SPEED = re.compile("train/(.*_per_second|.*_seconds|.*_megabytes|learning_rate)")


class MetricsRecorder(Reporter):
    """Records the curves, without those of speed and of the learning rate."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def metrics(self, values, step):
        self.values.extend(value for name, value in values.items() if not SPEED.fullmatch(name))


def train_to_end(
    folder: Path,
    dist: DistributedContext,
    model: VQVAEConfig = MODEL,
    config: TrainConfig = CONFIG,
    shares_checkpoints: bool = False,
    keep: int = 1,
) -> dict[str, Tensor]:
    """Train; return weights and codebooks, and all metrics as one more tensor, "metrics"."""

    def batches(start: int) -> Iterator[Tensor]:
        sampler = GlobalBatchSampler(
            ShuffledStream(len(IMAGES), 0), config.batch_size, range(start, 7), dist.rank, dist.world_size
        )
        for samples in sampler:
            yield IMAGES[[sample.image_index for sample in samples]]

    torch.manual_seed(3)
    objective = VQVAEObjective(VQVAE(model), PREVIEWED)
    data = TrainingData(batches, {"validation": lambda: iter(VALIDATION[dist.rank :: dist.world_size].split(2))})
    checkpoints = Checkpoints(folder / ("0" if shares_checkpoints else str(dist.rank)), "print", keep)
    recorder = MetricsRecorder()
    TrainingLoop(objective, data, config, seed=3, dist=dist, checkpoints=checkpoints, reporter=recorder).run()
    state = {name: tensor.contiguous() for name, tensor in objective.network.state_dict().items()}
    return state | {"metrics": torch.tensor(recorder.values)}


def train_rank(rank: int, folder: Path) -> None:
    """Train as one of two ranks and save the result."""
    dist = DistributedContext(
        rank, 2, all_reduce=distributed.all_reduce, start_all_reduce=start_all_reduce, wrap=wrap_ddp
    )
    save_file(train_to_end(folder, dist), folder / f"{rank}.safetensors")


def train_rank_with_nan(rank: int, folder: Path) -> None:
    """Train as one of two ranks, of which rank 1 computes a NaN loss; save the error."""
    dist = DistributedContext(
        rank,
        2,
        all_reduce=distributed.all_reduce,
        start_all_reduce=start_all_reduce,
        wrap=wrap_ddp,
        inject_fault=lambda step: rank == 1 and step == 3,
    )
    try:
        train_to_end(folder, dist, config=replace(CONFIG, checkpoint_every=3))
    except UserError as error:
        (folder / f"{rank}.txt").write_text(f"{error.what}\n{error.where}")


def test_a_nan_loss_on_one_rank_ends_both_at_the_same_step(tmp_path: Path):
    """Neither rank waits for the other, and the checkpoint before the NaN stays."""
    run_ranks(train_rank_with_nan, tmp_path, world_size=2)
    errors = [(tmp_path / f"{rank}.txt").read_text().splitlines() for rank in (0, 1)]
    what = r"\w+ must be finite, got nan at step 5; earlier checkpoints are kept\."
    assert errors[0][0] == errors[1][0] and re.fullmatch(what, errors[0][0])
    assert errors[0][1] == str(tmp_path / "0")
    assert [path.name for path in (tmp_path / "0").iterdir()] == ["step-000000003"]


def test_two_ranks_train_the_vqvae_as_one_does(tmp_path: Path):
    """Both ranks have equal codebooks, within 1e-6 of one rank's, with previews, revivals and uneven last batches."""
    run_ranks(train_rank, tmp_path, world_size=2)
    rank0, rank1 = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    single = train_to_end(tmp_path / "single", DistributedContext())
    without_revival = replace(MODEL, quantizer=replace(MODEL.quantizer, revive_every=0))
    unrevived = train_to_end(tmp_path / "unrevived", DistributedContext(), without_revival)

    codebooks = [name for name in single if "quantizer" in name]
    assert len(codebooks) == 2 * 5
    # The comparison covers revival: some entries were revived.
    codebook = next(name for name in codebooks if "top" in name and name.endswith("codebook"))
    assert not torch.equal(single[codebook], unrevived[codebook])
    assert all(torch.equal(rank0[name], rank1[name]) for name in rank0)
    for name in codebooks:
        torch.testing.assert_close(rank0[name], single[name], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rank0["metrics"], single["metrics"], rtol=1e-4, atol=1e-6)


def train_rank_with_clock(rank: int, folder: Path) -> None:
    """Train as one of two ranks with checkpoints by time, and without; save both results.

    A step takes ten seconds on the clock of rank 0. That of rank 1 stands still.
    """
    dist = DistributedContext(
        rank, 2, all_reduce=distributed.all_reduce, start_all_reduce=start_all_reduce, wrap=wrap_ddp
    )
    now_s = [0.0]

    def take_step(step: int) -> bool:
        now_s[0] += 10 if rank == 0 else 0
        return False

    timer = CheckpointTimer(20, lambda: now_s[0])
    timed = replace(dist, checkpoint_timer=timer, inject_fault=take_step)
    save_file(train_to_end(folder / "timed", timed, keep=10), folder / f"timed-{rank}.safetensors")
    save_file(train_to_end(folder / "untimed", dist), folder / f"untimed-{rank}.safetensors")


def test_clock_of_rank_0_decides_when_both_save(tmp_path: Path):
    """Saving is a collective, so ranks that disagree would wait for each other. The result does not depend on it."""
    run_ranks(train_rank_with_clock, tmp_path, world_size=2)
    for rank in (0, 1):
        timed, untimed = (load_file(tmp_path / f"{name}-{rank}.safetensors") for name in ("timed", "untimed"))
        assert all(torch.equal(timed[name], untimed[name]) for name in timed)
    assert sorted(path.name[-1] for path in (tmp_path / "timed" / "0").iterdir()) == ["3", "6", "7"]


def train_rank_in_two_runs(rank: int, folder: Path) -> None:
    """Train as one of three ranks without a break, and again with a stop after the third step; save both results."""
    dist = DistributedContext(
        rank, 3, all_reduce=distributed.all_reduce, start_all_reduce=start_all_reduce, wrap=wrap_ddp
    )
    calls = iter(range(100))
    stopping = replace(dist, stop_requested=lambda: rank == 1 and next(calls) == 2)
    save_file(train_with_three(folder / "unbroken", dist), folder / f"unbroken-{rank}.safetensors")
    with suppress(TrainingStopped):
        train_with_three(folder / "resumed", stopping)
    distributed.barrier()
    save_file(train_with_three(folder / "resumed", dist), folder / f"resumed-{rank}.safetensors")


def train_with_three(folder: Path, dist: DistributedContext) -> dict[str, Tensor]:
    """Train on a global batch that three ranks share, with checkpoints that every rank reads."""
    return train_to_end(folder, dist, config=replace(CONFIG, batch_size=6), shares_checkpoints=True)


def test_three_ranks_resume_bit_identical(tmp_path: Path):
    """The order of sums over more than two ranks matters, and is the same after a restart."""
    run_ranks(train_rank_in_two_runs, tmp_path, world_size=3)
    for rank in range(3):
        unbroken, resumed = (load_file(tmp_path / f"{name}-{rank}.safetensors") for name in ("unbroken", "resumed"))
        assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken if name != "metrics")
