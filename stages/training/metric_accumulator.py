"""Accumulator of metric sums over batches and ranks.

R ranks; M numbers, all metrics of an objective concatenated in the order of `Objective.zero_metrics`.
"""

import torch
from torch import Tensor

from stages.training.distributed import DistributedContext
from stages.training.objective import MetricSums, Objective


class MetricAccumulator:
    """Running sums of one rank's metrics, all-reduced and divided once. A rank without batches adds zeros."""

    def __init__(self, objective: Objective, dist: DistributedContext) -> None:
        self.objective, self.dist = objective, dist
        self.sizes = {name: len(zeros) for name, zeros in objective.zero_metrics().items()}
        # (M,); double, because float32 counts values exactly only up to 2**24.
        self.local = torch.zeros(sum(self.sizes.values()), dtype=torch.double, device=dist.device)

    def add(self, metrics: MetricSums) -> None:
        """Add the sums of one batch."""
        self.local += torch.cat([metrics[name].detach().to(self.local) for name in self.sizes])

    def summarize(self) -> dict[str, float]:
        """Return the metrics over all batches of all ranks. A collective: every rank calls it."""
        total = self.local.clone()
        self.dist.all_reduce(total)
        sums = total.cpu().split(list(self.sizes.values()))
        return self.objective.summarize(dict(zip(self.sizes, sums, strict=True)))

    def gather_by_rank(self) -> Tensor:
        """Return an (R, M) matrix with one row per rank. A collective: every rank calls it.

        Rows stay apart because float addition is not associative: a resumed run continues each partial sum exactly.
        """
        rows = self.local.new_zeros(self.dist.world_size, len(self.local))
        rows[self.dist.rank] = self.local
        self.dist.all_reduce(rows)
        return rows

    def restore(self, rows: Tensor) -> None:
        """Continue from the (R, M) matrix of `gather_by_rank`, possibly of another world size.

        A rank takes its own row; with fewer ranks than before, the remaining rows are dealt out in turn.
        """
        self.local += rows[self.dist.rank :: self.dist.world_size].sum(0).to(self.local.device)
