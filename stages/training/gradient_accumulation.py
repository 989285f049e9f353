"""Gradient accumulation: the forward and backward passes of one step, over the micro-batches of a rank's images.

A micro-batch is the images of one forward and backward pass, so its size bounds the memory of activations. Gradients,
codebook sums and metrics add up over micro-batches. Ranks exchange gradients and codebook sums once per step.

The loss of a step is the mean over the global batch of B images; that of a micro-batch is the mean over its n images.
The R ranks average their gradients, so the loss of a micro-batch is multiplied by n R / B. This factor is exactly 1 if
the micro-batch is a rank's whole share and all shares are equal.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from models.quantizer import BatchSlice
from models.random import seed_from
from stages.config import TrainConfig
from stages.errors import UserError
from stages.training.checkpoint_state import MICROBATCH
from stages.training.distributed import DistributedContext, SumsInFlight, add_sums
from stages.training.objective import MetricSums, Objective, StepResult
from stages.training.sampler import share_of_rank
from stages.training.step_timer import StepTimer

Sums = Mapping[str, tuple[Tensor, ...]]
BUCKET_BYTES = 25 * 2**20  # of gradients in one collective, as in DDP


class StepSums(NamedTuple):
    """Sums of one step, apart from its gradients."""

    in_flight: SumsInFlight  # pending all-reduce of codebook sums and votes
    metrics: list[MetricSums]  # of each micro-batch of this rank


class GradientAccumulator:
    """Forward and backward passes of one rank, over micro-batches of `size` images at most.

    With `microbatch: auto` the size starts at the largest share of a rank. If any rank runs out of device memory in a
    step, all ranks halve the size and compute the step again. An all-reduce after the passes tells them of it; only
    then do they exchange gradients.
    """

    def __init__(self, objective: Objective, config: TrainConfig, *, seed: int, dist: DistributedContext) -> None:
        self.objective, self.config, self.seed, self.dist = objective, config, seed, dist
        self.timer = StepTimer(dist)
        self.is_automatic = config.microbatch == "auto"
        largest_share = math.ceil(config.batch_size / dist.world_size)
        self.size = config.microbatch if isinstance(config.microbatch, int) else largest_share
        self._first = share_of_rank(config.batch_size, dist.rank, dist.world_size).start
        self._wrapped = dist.wrap(objective)
        self._call: Any = torch.compile(self._wrapped) if config.compile else self._wrapped

    @property
    def evaluation_size(self) -> int:
        """Images that one call measures at most."""
        return self.config.batch_size if self.config.microbatch is None else self.size

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors to save: the size, if it is automatic."""
        return {MICROBATCH: torch.tensor(self.size)} if self.is_automatic else {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore an automatic size from a checkpoint. With more ranks now, it is at most the new share of a rank."""
        if self.is_automatic and MICROBATCH in tensors:
            self.size = min(self.size, int(tensors[MICROBATCH]))

    def accumulate(self, batch: Any, step: int, votes: Tensor, *, inject_nan: bool = False) -> StepSums:
        """Compute the gradients of a step, averaged over the global batch, from this rank's batch.

        Raises OutOfMemoryError if a micro-batch does not fit into the memory of the device: of `size` images, or of a
        single image if the size is automatic.
        """
        if not self.is_automatic:
            return self._accumulate_and_reduce(batch, step, votes, inject_nan)
        while (result := self._try_accumulate(batch, step, inject_nan)) is None:
            self.objective.zero_grad(set_to_none=True)
            if self.dist.device.type == "cuda":
                torch.cuda.empty_cache()
            if self.size == 1:
                raise torch.OutOfMemoryError("a single image does not fit")
            self.size //= 2
        sums, metrics = result
        in_flight = SumsInFlight(sums, votes, self.dist)
        with self.timer.waiting_for_peers():
            self._average_gradients()
        return StepSums(in_flight, metrics)

    def _accumulate_and_reduce(self, batch: Any, step: int, votes: Tensor, inject_nan: bool) -> StepSums:
        """Run the passes of a step; DDP averages the gradients over ranks during the last backward pass."""
        *others, (last, last_slice) = self._split(batch, step)
        with self._without_reduction():
            sums, metrics = self._run(others, inject_nan)
        result = self._forward(last, last_slice)
        in_flight = SumsInFlight(add_sums(sums, result.sums), votes, self.dist)
        self.timer.backward(self._weigh(result.loss, count_images(last), inject_nan))
        return StepSums(in_flight, [*metrics, detach(result.metrics)])

    def _try_accumulate(self, batch: Any, step: int, inject_nan: bool) -> tuple[Sums, list[MetricSums]] | None:
        """Run the passes of a step without exchanging gradients; return None if any rank runs out of memory."""
        result = None
        with suppress(torch.OutOfMemoryError), self._without_reduction():
            result = self._run(self._split(batch, step), inject_nan)
        failed_ranks = torch.full((1,), float(result is None), device=self.dist.device)
        self.dist.all_reduce(failed_ranks)
        return None if failed_ranks.item() else result

    def _run(self, microbatches: Iterable[tuple[Any, BatchSlice]], inject_nan: bool) -> tuple[Sums, list[MetricSums]]:
        """Run forward and backward passes; return the sums and the metrics of each micro-batch."""
        sums: Sums = {}
        metrics = []
        for part, batch_slice in microbatches:
            result = self._forward(part, batch_slice)
            sums = add_sums(sums, result.sums)
            metrics.append(detach(result.metrics))
            self._weigh(result.loss, count_images(part), inject_nan).backward()
        return sums, metrics

    def _forward(self, part: Any, batch_slice: BatchSlice) -> StepResult:
        # A rank's whole share is seeded with the rank, a micro-batch with the index of its first image. So equal
        # micro-batches get equal random numbers on any number of ranks.
        source = self.dist.rank if self.config.microbatch is None else batch_slice.start
        torch.manual_seed(
            seed_from(self.seed, batch_slice.step, 0 if self.objective.same_rng_on_all_workers else source)
        )
        with autocast(self.config, self.dist.device):
            return self._call(part, batch_slice, self.dist)

    def _weigh(self, loss: Tensor, images: int, inject_nan: bool) -> Tensor:
        """Multiply the loss of a micro-batch by its weight."""
        weight = images * self.dist.world_size / self.config.batch_size
        return loss * (math.nan if inject_nan else weight)

    def _split(self, batch: Any, step: int) -> list[tuple[Any, BatchSlice]]:
        """Split this rank's batch into micro-batches, each with its position in the global batch."""
        return [
            (part, BatchSlice(self.seed, step, self._first + number * self.size, self.config.batch_size))
            for number, part in enumerate(split_batch(batch, self.size))
        ]

    def _without_reduction(self) -> AbstractContextManager[object]:
        """Keep DDP from averaging gradients over ranks."""
        return self._wrapped.no_sync() if isinstance(self._wrapped, DistributedDataParallel) else nullcontext()

    def _average_gradients(self) -> None:
        """Average the gradients over ranks, as DDP does: the weights in `_backward` have the factor `world_size`."""
        if self.dist.world_size > 1:
            gradients = [weight.grad for weight in self.objective.parameters() if weight.grad is not None]
            average_in_buckets(gradients, self.dist)

    @contextmanager
    def explain_out_of_memory(self) -> Iterator[None]:
        """Raise UserError if the memory of the device does not suffice: for a pass, the optimizer or an evaluation."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"The device has too little memory to train with {self.size} image{'s' * (self.size > 1)} at once.",
                where=f"rank {self.dist.rank}, {self.dist.device}",
                fix="Set microbatch in the section of this training to a smaller number, or to auto."
                if self.size > 1
                else "Use a device with more memory, or a smaller network.",
                code=3,
            ) from error


def average_in_buckets(tensors: Iterable[Tensor], dist: DistributedContext) -> None:
    """Average tensors over ranks in place. A few large collectives cost less than one per tensor."""
    in_flight = []
    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket]).div_(dist.world_size)
        in_flight.append((bucket, flat, dist.start_all_reduce(flat)))
    for bucket, flat, wait in in_flight:
        wait()
        for tensor, average in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(average.view_as(tensor))


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Group tensors in their order, each group with BUCKET_BYTES or one tensor more."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(item.nbytes for item in bucket) >= BUCKET_BYTES:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[Any]:
    """Return a context that runs matrix products and convolutions in the configured precision."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision == "bfloat16")


def slice_batch(batch: Any, images: slice) -> Any:
    """Slice the first axis of a batch: of a tensor, or of the tensors in a named tuple or a dict."""
    if isinstance(batch, Tensor):
        return batch[images]
    if isinstance(batch, Mapping):
        return {name: slice_batch(value, images) for name, value in batch.items()}
    if isinstance(batch, tuple):
        return type(batch)(*(slice_batch(value, images) for value in batch))
    return batch  # None: a batch without labels


def split_batch(batch: Any, size: int) -> Iterator[Any]:
    """Split a batch into batches of `size` images; the last one may be smaller."""
    return (slice_batch(batch, slice(start, start + size)) for start in range(0, count_images(batch), size))


def count_images(batch: Any) -> int:
    """Return the length of the first axis of a batch's tensors."""
    if isinstance(batch, Tensor):
        return len(batch)
    return count_images(next(iter(batch.values() if isinstance(batch, Mapping) else batch)))


def detach(metrics: MetricSums) -> MetricSums:
    """Detach metrics from the graph, which they would otherwise keep in memory until the end of the step."""
    return {name: sums.detach() for name, sums in metrics.items()}
