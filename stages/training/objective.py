"""Interface between the training loop and what it trains: a network, its loss, its metrics, its data."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from models.quantizer import BatchSlice
from stages.training.distributed import DistributedContext

MetricSums = dict[str, Tensor]  # metric -> 1-D tensor of sums, additive over batches and over ranks


class StepResult(NamedTuple):
    """Loss, collective sums and metrics of one micro-batch."""

    loss: Tensor
    sums: Mapping[str, tuple[Tensor, ...]]  # summed over micro-batches and ranks, then passed to `absorb`
    metrics: MetricSums


class Objective(nn.Module):
    """A network with its training loss and its evaluation metrics.

    `forward` computes the loss of a micro-batch; DDP wraps the objective, so gradients are averaged over ranks.
    """

    network: nn.Module
    # True if `forward` draws random numbers for the whole global batch, which every rank must then draw alike.
    same_rng_on_all_workers = False

    def zero_metrics(self) -> MetricSums:
        """Return the sums of no batches: the names and lengths of what `forward` and `measure` return."""
        raise NotImplementedError

    def forward(self, batch: Any, batch_slice: BatchSlice, dist: DistributedContext) -> StepResult:
        """Compute the loss of a micro-batch of this rank, a mean over its images."""
        raise NotImplementedError

    def absorb(self, sums: Mapping[str, Any]) -> None:
        """Update what gradients do not train, from `StepResult.sums` summed over ranks."""

    def measure(self, network: nn.Module, batch: Any, dist: DistributedContext) -> MetricSums:
        """Sum the metrics of a batch under the weights of `network`."""
        raise NotImplementedError

    def summarize(self, sums: MetricSums) -> dict[str, float]:
        """Divide sums over all batches and ranks into metrics."""
        raise NotImplementedError

    def previews(self, network: nn.Module) -> dict[str, bytes]:
        """Draw PNG images that show the quality of the network, by name. Only rank 0 calls this."""
        return {}


@dataclass(frozen=True)
class TrainingData:
    """Batches of this rank. Each call returns a new iterator."""

    # First step -> one batch per step, from that step on. A batch is a tensor, or a named tuple or dict of tensors,
    # whose first axis is images.
    training: Callable[[int], Iterable[Any]]
    evaluation: Mapping[str, Callable[[], Iterable[Any]]]  # split -> its batches
