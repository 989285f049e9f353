"""Training images of a classifier: the training split of shards, or samples."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from stages.errors import UserError
from stages.formats import artifact
from stages.formats.codes import Codes
from stages.formats.samples import KIND as SAMPLES_KIND
from stages.formats.samples import Samples, open_samples
from stages.formats.shards import ImageSet, Shards, open_shards


@dataclass(frozen=True)
class SampleImages:
    """Random access to samples by number."""

    samples: Samples

    def __len__(self) -> int:
        return self.samples.count

    @cached_property
    def labels(self) -> np.ndarray:
        """Labels of all samples, (N,) int64; -1 without classes. The codes are not read."""
        samples = self.samples
        return Codes(samples.artifact, samples.levels, samples.classes, samples.vqvae).split("samples", ()).labels

    def read(self, position: int) -> np.ndarray:
        """Read an image as (H, W, 3) uint8. Raises UserError if it is missing."""
        return self.samples.images(position, position + 1)[0]


def open_images(folder: Path, dataset: Shards) -> ImageSet | SampleImages:
    """Open the training images of shards, or samples of models that were trained on `dataset`.

    The contents are verified as they are read (shards), or by `SampleImages.verify`. Raises UserError if the folder is
    missing or incomplete, or if its classes or its image size differ from the dataset's.
    """
    images: ImageSet | SampleImages
    if artifact.kind(folder) == SAMPLES_KIND:
        images = SampleImages(open_samples(folder))
        classes, image_size = images.samples.classes, images.samples.image_size
    else:
        shards = open_shards(folder)
        images, classes, image_size = shards.split("train"), shards.classes, shards.image_size
    if (classes, image_size) != (dataset.classes, dataset.image_size):
        raise UserError(
            f"{folder.name} must have the classes and the image size of the shards, got {len(classes)} classes and "
            f"{image_size} pixels.",
            where=folder,
            fix="Run: vqvae2 run",
            code=5,
        )
    return images
