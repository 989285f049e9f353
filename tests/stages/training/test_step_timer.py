"""Time of steps: what a rank waits for is told apart from what it computes."""

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn

from stages.training import step_timer
from stages.training.device_peak import PEAK_FLOPS, device_name, model_flops_metrics
from stages.training.distributed import DistributedContext, start_all_reduce, wrap_ddp
from stages.training.step_timer import StepTimer, progress_numbers
from tests.gloo import run_ranks

SLOW_S = 1.0


def test_waiting_for_data_is_not_computing(monkeypatch):
    """An evaluation belongs to neither."""
    clock = [0.0]
    monkeypatch.setattr(step_timer, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    timer = StepTimer(DistributedContext())

    def batches() -> Iterator[int]:
        for number in range(4):
            clock[0] += 2  # loading
            yield number

    for _ in timer.batches(batches()):
        clock[0] += 5  # computing
    clock[0] += 100
    timer.exclude(100)
    split = timer.summarize(4)
    assert (split["data_seconds"], split["compute_seconds"], split["reduce_seconds"]) == (2, 5, 0)
    timer.restart()
    assert timer.summarize(1)["data_seconds"] == 0


class Sleep(nn.Module):
    """A layer that needs its time in the forward pass."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.layer, self.seconds = nn.Linear(4, 4), seconds

    def forward(self, images: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return self.layer(images)


def time_rank(rank: int, folder: Path) -> None:
    """Time two steps of two ranks, of which rank 1 is slow; save the split of each rank, before their mean."""
    dist = DistributedContext(
        rank, 2, all_reduce=lambda rows: rows.mul_(2), start_all_reduce=start_all_reduce, wrap=wrap_ddp
    )
    network = dist.wrap(Sleep(SLOW_S * rank))
    distributed.barrier()
    timer = StepTimer(dist)
    for _ in range(2):
        timer.backward(network(torch.ones(2, 4)).sum())
    split = timer.summarize(2)
    save_file({name: torch.tensor(value) for name, value in split.items()}, folder / f"{rank}.safetensors")


def test_waiting_for_a_slow_rank_counts_as_reduce(tmp_path: Path):
    """The fast one waits for the gradients of the slow one, inside of its backward pass."""
    run_ranks(time_rank, tmp_path, world_size=2)
    fast, slow = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert fast["reduce_seconds"] > SLOW_S / 4 > slow["reduce_seconds"]
    assert slow["compute_seconds"] > SLOW_S > fast["data_seconds"] == 0
    assert fast["peak_memory_megabytes"] > 10


def test_split_is_the_mean_over_ranks_and_memory_the_largest():
    """Each rank adds a row; here the other rank has waited for data longer, and has used more memory."""

    def all_reduce(rows: Tensor) -> None:
        rows[1] = torch.tensor([8.0, 4.0, 2.0, 9e12])

    split = StepTimer(DistributedContext(0, 2, all_reduce=all_reduce)).summarize(2)
    assert (split["data_seconds"], split["reduce_seconds"]) == (1, 0.5)
    assert split["compute_seconds"] == pytest.approx(0.5, abs=0.2)
    assert split["peak_memory_megabytes"] == pytest.approx(9e6)


def test_utilization_is_the_share_of_the_peak_of_all_devices():
    """A training step takes three times the operations of a forward pass."""
    metrics = model_flops_metrics(1e12, 100, devices=2, name="NVIDIA H200", precision="bfloat16")
    assert metrics == {"model_tflops_per_second": 300, "model_flops_utilization": pytest.approx(300 / (2 * 989.5))}


@pytest.mark.parametrize(
    ("name", "precision"), [("", "bfloat16"), ("NVIDIA H200", "float32"), ("NVIDIA H200 MIG 1g.18gb", "bfloat16")]
)
def test_utilization_is_left_out_where_the_peak_is_unknown(name: str, precision: str):
    """A CPU, a precision without a peak, and a part of a GPU."""
    metrics = model_flops_metrics(1e12, 100, devices=1, name=name, precision=precision)
    assert metrics == {"model_tflops_per_second": 300}
    assert model_flops_metrics(0, 100, devices=1, name=name, precision=precision) == {}


def test_peaks_are_without_sparsity():
    """No device computes twice as much as the fastest one's dense peak."""
    assert all(1e14 < peak < 1e15 for peaks in PEAK_FLOPS.values() for peak in peaks.values())
    assert device_name(torch.device("cpu")) == ""


def test_progress_has_shares_of_the_step():
    """MFU only where it is known, and no wait for other workers where there are none."""
    speed = {
        "images_per_second": 50.0,
        "data_seconds": 1.0,
        "compute_seconds": 2.0,
        "reduce_seconds": 1.0,
        "peak_memory_megabytes": 1500.0,
    }
    assert progress_numbers(speed) == {"images/s": 50, "data %": 25, "reduce %": 25, "memory GB": 1.5}
    assert progress_numbers({**speed, "model_flops_utilization": 0.4})["MFU %"] == 40
    assert "reduce %" not in progress_numbers({**speed, "reduce_seconds": 0.0})


@pytest.mark.gpu
def test_memory_and_waits_of_a_gpu_are_those_of_the_device():
    """Events on the device time the waits, because the process runs ahead of it."""
    device = torch.device("cuda")
    timer = StepTimer(DistributedContext(world_size=2, device=device))
    matrix = torch.ones(4096, 4096, device=device)
    with timer.waiting_for_peers():
        for _ in range(50):
            matrix = matrix @ matrix * 0
    split = timer.summarize(1)
    assert split["reduce_seconds"] > 1e-3 and split["peak_memory_megabytes"] >= 4 * 4096**2 / 1e6
