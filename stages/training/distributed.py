"""One training process among its peers: rank, world size, collectives, and decisions that all ranks share.

Every collective runs at a point that depends only on the step number or on a value that all ranks already agree on.
A collective behind a condition that one rank alone computes would leave the other ranks waiting for ever.
"""

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
import torch.distributed
from torch import Tensor, nn


class CheckpointMismatch(Exception):
    """The ranks' newest checkpoints are of different steps."""


class CheckpointTimer:
    """Timer of rank 0 for checkpoints by time. With an interval of 0 it is never due."""

    def __init__(self, interval_s: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.interval_s, self._clock = interval_s, clock
        self._start = clock()

    def is_due(self) -> bool:
        """Return whether the interval is over. Returns True once: the checkpoint is saved a step later."""
        if not self.interval_s or self._clock() - self._start < self.interval_s:
            return False
        self.restart()
        return True

    def restart(self) -> None:
        """Begin an interval: a checkpoint was saved."""
        self._start = self._clock()


@dataclass(frozen=True)
class DistributedContext:
    """Rank, device and collectives of this process. The defaults describe a single process on a CPU."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    all_reduce: Callable[[Tensor], None] = lambda tensor: None  # sums over ranks, in place
    # The same in the background. The tensor holds the sum after a call of the returned function.
    start_all_reduce: Callable[[Tensor], Callable[[], Any]] = lambda tensor: lambda: None
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module  # DDP: averages gradients over ranks
    stop_requested: Callable[[], bool] = lambda: False
    checkpoint_timer: CheckpointTimer = field(default_factory=CheckpointTimer)  # only that of rank 0 has an interval
    flops_per_image: float = 0.0  # of a forward pass, for the metrics; 0 if unknown
    devices: float = 1.0  # devices of all ranks: fewer than ranks if several share one
    inject_fault: Callable[[int], bool] = lambda step: False  # before a step; True makes the step's loss NaN


def start_all_reduce(tensor: Tensor) -> Callable[[], Any]:
    """Sum a tensor over ranks in place and in the background; return the function that waits for the sum."""
    work = torch.distributed.all_reduce(tensor, async_op=True)
    assert work is not None  # it is None only on processes outside of the group
    return work.wait


def wrap_ddp(module: nn.Module) -> nn.Module:
    """Average gradients over ranks.

    On CPUs the order of sums is the same in every step, so that a resumed training is bit-identical. DDP otherwise
    rearranges its buckets after the first step of a process, which changes the order with three ranks or more.
    """
    on_cpu = next(module.parameters()).device.type == "cpu"
    warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")  # for what it finds none of
    with warnings.catch_warnings():
        # The argument that replaces it came with torch 2.13, and earlier versions are supported.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        # Codebooks are buffers that every rank updates from the same all-reduced sums: DDP need not broadcast them.
        # `find_unused_parameters` keeps the first buckets.
        return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False, find_unused_parameters=on_cpu)


def require_same_start(start: int, dist: DistributedContext) -> None:
    """Raise CheckpointMismatch unless all ranks start at the same step.

    Ranks that are one checkpoint apart would train without an error. They can be: a network disk may show one node a
    folder that another node does not see yet, and a read error may cost one node its newest checkpoint.
    """
    starts = torch.zeros(dist.world_size, dtype=torch.int64, device=dist.device)
    starts[dist.rank] = start
    dist.all_reduce(starts)
    if (starts != start).any():
        steps = ", ".join(map(str, starts.tolist()))
        raise CheckpointMismatch(f"The newest checkpoints of all workers must be of the same step, got steps {steps}.")


class SumsInFlight:
    """Codebook sums and votes of one step, summed over ranks as one tensor while the backward pass runs.

    One large collective costs less than many small ones: each has a latency of its own. Every rank starts it once per
    step, before its backward pass.
    """

    def __init__(self, sums: Mapping[str, tuple[Tensor, ...]], votes: Tensor, dist: DistributedContext) -> None:
        self._sums, self._votes = sums, votes
        self._wait = lambda: None
        if dist.world_size > 1:
            tensors = [tensor for level_sums in sums.values() for tensor in level_sums]
            self._flat = torch.cat([*(tensor.reshape(-1) for tensor in tensors), votes])
            self._wait = dist.start_all_reduce(self._flat)
            views = iter(self._flat.split([*(tensor.numel() for tensor in tensors), len(votes)]))
            self._sums = {
                level: _with_tensors(level_sums, [next(views).view_as(tensor) for tensor in level_sums])
                for level, level_sums in sums.items()
            }
            self._votes = next(views)

    def wait(self) -> tuple[Mapping[str, tuple[Tensor, ...]], Tensor]:
        """Return the sums and the votes over all ranks."""
        self._wait()
        return self._sums, self._votes


def add_sums(left: Mapping[str, tuple[Tensor, ...]], right: Mapping[str, tuple[Tensor, ...]]) -> Mapping[str, Any]:
    """Add the sums of two batches by name. Sums that `left` lacks count as zero."""
    return {
        name: _with_tensors(sums, [a + b for a, b in zip(left[name], sums, strict=True)]) if name in left else sums
        for name, sums in right.items()
    }


def _with_tensors(example: tuple[Tensor, ...], tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Return a tuple of tensors of the same type as `example`, which may be a NamedTuple."""
    make = getattr(example, "_make", tuple)
    return cast("tuple[Tensor, ...]", make(tensors))


class StepDecision(NamedTuple):
    """Decision of all ranks after a step."""

    stop: bool  # save and stop
    save: bool  # save a checkpoint


class StepVote:
    """Votes of all ranks to stop or to save, combined so that every rank does so after the same step.

    Any rank may ask to stop. Only rank 0 asks to save, because clocks differ. The votes of a step are read after the
    next one. Their copy to the CPU then overlaps the work of the GPU instead of stalling it.
    """

    def __init__(self, dist: DistributedContext) -> None:
        self.dist = dist
        self._votes = torch.zeros(2)  # ranks that voted to stop, and to save, in the step before
        self._copied: torch.cuda.Event | None = None

    def cast(self) -> Tensor:
        """Return this rank's votes, to be summed over ranks: (2,), 1 to stop, 1 to save."""
        # A single process reads its vote at once, which on a GPU would wait for the device.
        device = self.dist.device if self.dist.world_size > 1 else torch.device("cpu")
        votes = (self.dist.stop_requested(), self.dist.checkpoint_timer.is_due())
        # Filled on the device: a copy of numbers to it would wait for all its work.
        return torch.cat([torch.full((1,), float(vote), device=device) for vote in votes])

    def count(self, votes: Tensor) -> StepDecision:
        """Take the votes of this step; return what to do after it. Every rank calls this once per step."""
        if self.dist.world_size == 1:
            return StepDecision(*map(bool, votes))
        if self._copied is not None:
            self._copied.synchronize()
        decision = StepDecision(*map(bool, self._votes))
        self._votes = votes.to("cpu", non_blocking=True)
        if votes.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()
        return decision
