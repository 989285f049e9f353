"""Time of training steps, split by what a rank waits for, and the largest memory that it has used.

data      the process waits for the next batch
reduce    the device waits for sums of other ranks, after it has computed its own
compute   the rest: forward and backward passes, the optimizer, and the copy of a checkpoint

DDP exchanges gradients while the backward pass runs. Only the time after the last gradient counts as `reduce`: what
overlaps with computing costs nothing. On a GPU, events on the device measure it, because the process runs ahead.
"""

import resource
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import Variable

from stages.training.distributed import DistributedContext

T = TypeVar("T")

MEGABYTE = 1e6
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss


class StepTimer:
    """Timer of the steps since the last log entry."""

    def __init__(self, dist: DistributedContext) -> None:
        self.dist = dist
        self.restart()

    def restart(self) -> None:
        """Begin an interval."""
        self._start_s, self._data_s = time.monotonic(), 0.0
        self._waits: list[tuple[Any, Any]] = []  # marks before and after each wait for other ranks

    def exclude(self, seconds: float) -> None:
        """Leave out time that is no training, such as an evaluation."""
        self._start_s += seconds

    def batches(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the batches, and measure how long each takes to arrive."""
        iterator = iter(batches)
        while True:
            start_s = time.monotonic()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._data_s += time.monotonic() - start_s
            yield batch

    @contextmanager
    def waiting_for_peers(self) -> Iterator[None]:
        """Count the block as waiting for other ranks."""
        if self.dist.world_size == 1:
            yield
            return
        before = self._mark()
        yield
        self._waits.append((before, self._mark()))

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass in which DDP averages gradients, and measure its wait for other ranks."""
        if self.dist.world_size == 1:
            loss.backward()
            return
        computed: list[Any] = []

        def at_start(gradient: Tensor) -> None:
            # Autograd calls these functions in order after the last gradient. DDP's, which waits, is added later.
            Variable._execution_engine.queue_callback(lambda: computed.append(self._mark()))

        loss.register_hook(at_start)
        loss.backward()
        self._waits += [(mark, self._mark()) for mark in computed]

    def summarize(self, steps: int) -> dict[str, float]:
        """Return seconds per step as a mean over ranks, and the largest memory. A collective: every rank calls it."""
        total_s = time.monotonic() - self._start_s
        reduce_s = sum(self._seconds(before, after) for before, after in self._waits)
        rows = torch.zeros(self.dist.world_size, 4, dtype=torch.double, device=self.dist.device)
        values = (total_s, self._data_s, reduce_s, peak_memory_bytes(self.dist.device))
        rows[self.dist.rank] = torch.tensor(values, dtype=torch.double)
        self.dist.all_reduce(rows)
        rows = rows.cpu()
        total_s, data_s, reduce_s = (rows[:, :3].mean(0) / max(steps, 1)).tolist()
        return {
            "data_seconds": data_s,
            "compute_seconds": max(0.0, total_s - data_s - reduce_s),
            "reduce_seconds": reduce_s,
            "peak_memory_megabytes": rows[:, 3].max().item() / MEGABYTE,
        }

    def _mark(self) -> Any:
        """Return the present moment of the device."""
        if self.dist.device.type != "cuda":
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, before: Any, after: Any) -> float:
        if self.dist.device.type != "cuda":
            return float(after - before)
        after.synchronize()
        return float(before.elapsed_time(after)) / 1000


def step_seconds(seconds: Mapping[str, float]) -> float:
    """Return the seconds of a step, the sum of its parts in `StepTimer.summarize`."""
    return sum(seconds[f"{part}_seconds"] for part in ("data", "compute", "reduce"))


def progress_numbers(speed: Mapping[str, float]) -> dict[str, float]:
    """Return the numbers beside the progress of a training, from its metrics: what fits on a line."""
    step_s = step_seconds(speed) or 1.0
    numbers = {
        "images/s": speed["images_per_second"],
        "data %": 100 * speed["data_seconds"] / step_s,
    }
    if speed["reduce_seconds"]:  # none with one worker
        numbers["reduce %"] = 100 * speed["reduce_seconds"] / step_s
    numbers["memory GB"] = speed["peak_memory_megabytes"] / 1000
    if "model_flops_utilization" in speed:
        numbers["MFU %"] = 100 * speed["model_flops_utilization"]
    return numbers


def peak_memory_bytes(device: torch.device) -> int:
    """Return the largest memory so far: of tensors on a GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT
