"""Batches of images for training and evaluation, read from shards.

B images per rank and step, H x W pixels. Batches are uint8 (B, H, W, 3): loader processes then move a quarter of
float32's bytes, and the objective converts them on its device.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from stages.config import AugmentConfig, TrainConfig
from stages.errors import UserError
from stages.formats.shards import ImageSet, Shards
from stages.images.augment import augment
from stages.training.distributed import DistributedContext
from stages.training.objective import TrainingData
from stages.training.sampler import GlobalBatchSampler, SampleRef, ShuffledStream


def image_data(
    shards: Shards,
    augment_config: AugmentConfig,
    config: TrainConfig,
    *,
    seed: int,
    dist: DistributedContext,
    loader_workers: int,
) -> TrainingData:
    """Return this rank's batches: augmented training images, and validation images if there are any."""
    stream = ShuffledStream(len(shards.split("train")), seed)
    augmented = AugmentedImages(shards.split("train"), augment_config, seed)

    def training(start: int) -> Iterator[Tensor]:
        sampler = GlobalBatchSampler(stream, config.batch_size, range(start, config.steps), dist.rank, dist.world_size)
        return load_batches(augmented, batch_sampler=sampler, num_workers=loader_workers)

    def evaluation(split: ImageSet) -> Iterator[Tensor]:
        indices = range(dist.rank, min(len(split), config.evaluate_images), dist.world_size)
        return load_batches(PlainImages(split, indices), batch_size=config.batch_size, num_workers=loader_workers)

    validation = shards.split("validation")
    return TrainingData(training, {"validation": lambda: evaluation(validation)} if len(validation) else {})


def load_batches(images: Dataset[Any], **loader_options: Any) -> Iterator[Any]:
    """Read images batch by batch with a DataLoader. Raises UserError if an image cannot be read."""
    for batch in DataLoader(ErrorCapturingDataset(images), collate_fn=_collate, **loader_options):
        if isinstance(batch, UserError):
            raise batch
        yield batch


class ReadableImages(Protocol):
    """Random access to images."""

    def read(self, position: int) -> np.ndarray:
        """Read an image as (H, W, 3) uint8. Raises UserError if it is damaged."""


class AugmentedImages(Dataset[Tensor]):
    """Training images (H, W, 3), augmented with a seed derived from their position in the stream."""

    def __init__(self, images: ReadableImages, config: AugmentConfig, seed: int):
        self.images, self.config, self.seed = images, config, seed

    def __getitem__(self, ref: SampleRef) -> Tensor:
        image = augment(self.images.read(ref.image_index), self.config, self.seed, ref.position)
        return torch.from_numpy(np.array(image))  # a copy: from_numpy rejects a flipped image's negative strides


class PlainImages(Dataset[Tensor]):
    """Images (H, W, 3) of a range of indices, without augmentation."""

    def __init__(self, images: ReadableImages, indices: range):
        self.images, self.indices = images, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> Tensor:
        image = self.images.read(self.indices[number])
        return torch.from_numpy(np.array(image))  # a copy: decoded images are read-only


class ErrorCapturingDataset(Dataset[Tensor | UserError]):
    """Dataset that returns a UserError instead of raising it.

    A DataLoader re-raises an exception of its processes as a new exception whose message is a traceback.
    """

    def __init__(self, images: Dataset[Any]):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]  # DataLoader asks only datasets that have a length

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.images[key]
        except UserError as error:
            return error


def _collate(images: list[Any]) -> Any:
    error = next((image for image in images if isinstance(image, UserError)), None)
    return default_collate(images) if error is None else error
