"""Data order of training: a pure function of (seed, step), the same for any number of ranks.

Training reads one endless stream of images, with a new shuffle for each epoch. Step s takes the positions
[s * batch_size, (s + 1) * batch_size) of the stream, and each rank a slice of them. So resuming needs only the step,
and 1, 3 or 8 ranks see the same global batches.
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


def share_of_rank(batch_size: int, rank: int, world_size: int) -> range:
    """Return the positions of one rank's images in the global batch. The shares differ by one image at most.

    Raises ValueError if a rank would have no image.
    """
    if batch_size < world_size:
        raise ValueError(f"batch_size must be at least the {world_size} workers, got {batch_size}")
    return range(batch_size * rank // world_size, batch_size * (rank + 1) // world_size)


class GlobalBatchSampler:
    """Batch sampler for a DataLoader: one rank's slices of the global batches of `steps`.

    Raises ValueError if a rank would have no image.
    """

    def __init__(self, stream: ShuffledStream, batch_size: int, steps: range, rank: int = 0, world_size: int = 1):
        self.stream, self.batch_size, self.steps = stream, batch_size, steps
        self.share = share_of_rank(batch_size, rank, world_size)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[SampleRef]]:
        for step in self.steps:
            yield [self.stream[step * self.batch_size + position] for position in self.share]
