"""Which images make the batch of a step: a pure function of (seed, step), whatever the number of workers.

Training reads one endless stream: the training images in an order shuffled anew for each epoch. Step s takes the
positions [s * batch_size, (s + 1) * batch_size) of that stream, and each worker its equal slice of them. So resuming
needs one number, and 1, 2 or 8 workers see the same global batches.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class SampleRef(NamedTuple):
    """One place in the stream: its position, which also seeds augmentation, and the image that stands there."""

    position: int
    image: int


class ShuffledStream:
    """The stream of `count` images under `seed`."""

    def __init__(self, count: int, seed: int):
        if count < 1:
            raise ValueError(f"there are {count} images to train on; at least 1 is needed")
        self.count, self.seed = count, seed
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    def __getitem__(self, position: int) -> SampleRef:
        epoch, place = divmod(position, self.count)
        if epoch != self._epoch:
            self._permutation = np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(self.count)
            self._epoch = epoch
        return SampleRef(position, int(self._permutation[place]))


class GlobalBatchSampler:
    """A worker's slices of the global batches of steps [start, stop); a batch sampler for a DataLoader."""

    def __init__(self, order: ShuffledStream, batch_size: int, *, start: int, stop: int, rank: int, workers: int):
        self.order, self.batch_size, self.steps = order, batch_size, range(start, stop)
        self.first, self.size = worker_slice(batch_size, rank, workers)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[SampleRef]]:
        for step in self.steps:
            start = step * self.batch_size + self.first
            yield [self.order[position] for position in range(start, start + self.size)]


def worker_slice(batch_size: int, rank: int, workers: int) -> tuple[int, int]:
    """A worker's first image within the global batch, and how many it takes."""
    if batch_size % workers:
        raise ValueError(
            f"batch_size is {batch_size}, which {workers} workers cannot share evenly; use a multiple of {workers}"
        )
    size = batch_size // workers
    return rank * size, size
