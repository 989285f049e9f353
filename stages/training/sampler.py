"""Data order of training: a pure function of (seed, step), the same for any number of ranks.

Training reads one endless stream of images, with a new shuffle for each epoch. Step s takes the positions
[s * batch_size, (s + 1) * batch_size) of the stream, and each rank an equal slice of them. So resuming needs only the
step, and 1, 2 or 8 ranks see the same global batches.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class SampleRef(NamedTuple):
    """Position in the stream, which also seeds augmentation, and the index of the image at that position."""

    position: int
    image_index: int


class ShuffledStream:
    """Endless stream over `count` images: a new permutation per epoch, seeded with (seed, epoch)."""

    def __init__(self, count: int, seed: int):
        if count < 1:
            raise ValueError(f"the number of training images must be 1 or more, got {count}")
        self.count, self.seed = count, seed
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    def __getitem__(self, position: int) -> SampleRef:
        epoch, offset = divmod(position, self.count)
        if epoch != self._epoch:
            self._permutation = np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(self.count)
            self._epoch = epoch
        return SampleRef(position, int(self._permutation[offset]))


class GlobalBatchSampler:
    """Batch sampler for a DataLoader: one rank's slices of the global batches of `steps`.

    Raises ValueError if the ranks cannot share `batch_size` evenly.
    """

    def __init__(self, stream: ShuffledStream, batch_size: int, steps: range, rank: int = 0, world_size: int = 1):
        if batch_size % world_size:
            raise ValueError(f"batch_size must be a multiple of the {world_size} workers, got {batch_size}")
        self.stream, self.batch_size, self.steps = stream, batch_size, steps
        self.local_batch_size = batch_size // world_size
        self.first = rank * self.local_batch_size  # this rank's first position in the global batch

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[SampleRef]]:
        for step in self.steps:
            start = step * self.batch_size + self.first
            yield [self.stream[position] for position in range(start, start + self.local_batch_size)]
