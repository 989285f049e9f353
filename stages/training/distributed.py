"""One training process among its peers: rank, world size, collectives, and decisions that all ranks share.

Every collective runs at a point that depends only on the step number or on a value that all ranks already agree on.
A collective behind a condition that one rank alone computes would leave the other ranks waiting for ever.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


class CheckpointMismatch(Exception):
    """The ranks' newest checkpoints are of different steps."""


@dataclass(frozen=True)
class DistributedContext:
    """Rank, device and collectives of this process. The defaults describe a single process on a CPU."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    all_reduce: Callable[[Tensor], None] = lambda tensor: None  # sums over ranks, in place
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module  # DDP: averages gradients over ranks
    stop_requested: Callable[[], bool] = lambda: False
    inject_fault: Callable[[int], bool] = lambda step: False  # before a step; True makes the step's loss NaN


def wrap_ddp(module: nn.Module) -> nn.Module:
    """Average gradients over ranks."""
    # Codebooks are buffers that every rank updates from the same all-reduced sums, so DDP need not broadcast them.
    return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False)


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


class StopVote:
    """Stop requests of all ranks, combined so that every rank stops after the same step.

    With several ranks, `poll` returns the result of the previous call. The all-reduce and its copy to the CPU then
    overlap the work of the GPU instead of stalling it.
    """

    def __init__(self, dist: DistributedContext) -> None:
        self.dist = dist
        self._votes = torch.zeros(1)  # ranks that were asked to stop, as of the previous call
        self._copied: torch.cuda.Event | None = None

    def poll(self) -> bool:
        """Vote, and return whether to stop after this step. Every rank calls this once per step."""
        if self.dist.world_size == 1:
            return self.dist.stop_requested()
        if self._copied is not None:
            self._copied.synchronize()
        stop = bool(self._votes)
        votes = torch.full((1,), float(self.dist.stop_requested()), device=self.dist.device)
        self.dist.all_reduce(votes)
        self._votes = votes.to("cpu", non_blocking=True)
        if votes.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()
        return stop
