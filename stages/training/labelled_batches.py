"""Batches of images with their labels, for training and testing a classifier.

B images per rank and step, H x W pixels.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from stages.config import AugmentConfig, TrainConfig
from stages.training.distributed import DistributedContext
from stages.training.image_batches import AugmentedImages, PlainImages, load_batches
from stages.training.objective import TrainingData
from stages.training.sampler import GlobalBatchSampler, SampleRef, ShuffledStream


class LabelledImages(Protocol):
    """Random access to N images with labels."""

    @property
    def labels(self) -> np.ndarray:
        """Label of each image, (N,) int64; -1: none."""

    def __len__(self) -> int: ...

    def read(self, position: int) -> np.ndarray:
        """Read an image as (H, W, 3) uint8. Raises UserError if it is damaged."""


class LabelledBatch(NamedTuple):
    """Images and their labels. An item of a dataset has one image and one label, without the axis B."""

    images: Tensor  # (B, H, W, 3) uint8
    labels: Tensor  # (B,) int64


class ImagesWithLabels:
    """The images of a set that have a label."""

    def __init__(self, images: LabelledImages):
        self.images = images
        self.positions = np.flatnonzero(images.labels >= 0)
        self.labels = images.labels[self.positions]

    def __len__(self) -> int:
        return len(self.positions)

    def read(self, index: int) -> np.ndarray:
        """Read an image as (H, W, 3) uint8. Raises UserError if it is damaged."""
        return self.images.read(int(self.positions[index]))


def labelled_data(
    training_images: LabelledImages,
    test_images: LabelledImages,
    augment_config: AugmentConfig,
    config: TrainConfig,
    *,
    seed: int,
    dist: DistributedContext,
    loader_workers: int,
) -> TrainingData:
    """Return this rank's batches of the images that have labels: augmented to train on, and unchanged to test on.

    The split of the test images is named "validation".
    """
    labelled, test = ImagesWithLabels(training_images), ImagesWithLabels(test_images)
    stream = ShuffledStream(len(labelled), seed)
    augmented = _WithLabels(AugmentedImages(labelled, augment_config, seed), labelled.labels)

    def training(start: int) -> Iterator[LabelledBatch]:
        sampler = GlobalBatchSampler(stream, config.batch_size, range(start, config.steps), dist.rank, dist.world_size)
        return load_batches(augmented, batch_sampler=sampler, num_workers=loader_workers)

    def evaluation() -> Iterator[LabelledBatch]:
        indices = range(dist.rank, min(len(test), config.evaluate_images), dist.world_size)
        images = _WithLabels(PlainImages(test, indices), test.labels[indices.start : indices.stop : indices.step])
        return load_batches(images, batch_size=config.batch_size, num_workers=loader_workers)

    return TrainingData(training, {"validation": evaluation})


class _WithLabels(Dataset[LabelledBatch]):
    """Dataset that adds the label of each image of another dataset. A key is an index, or a SampleRef to one."""

    def __init__(self, images: Dataset[Tensor], labels: np.ndarray):
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: Any) -> Any:
        index = key.image_index if isinstance(key, SampleRef) else key
        return LabelledBatch(self.images[key], self.labels[index])
