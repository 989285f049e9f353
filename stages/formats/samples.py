"""Samples on disk: images as shards, and the codes they were decoded from.

samples-{number:05d}.tar        KEY.png, and KEY.cls where there are classes; KEY is the sample's number
samples-{number:05d}.parquet    their codes, as in codes.py
grid.png                        the first samples, to look at
manifest.json                   meta: count, classes, image size, settings, the digests of the models
"""

import io
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from models.priors import Grid
from stages.errors import UserError
from stages.formats import artifact, codes
from stages.formats.artifact import Artifact
from stages.formats.codes import CodeSet

KIND = "samples"


@dataclass(frozen=True)
class Samples:
    """A folder of samples."""

    found: Artifact
    count: int
    classes: tuple[str, ...]
    image_size: int
    levels: Mapping[str, Grid]

    @cached_property
    def drawn(self) -> CodeSet:
        """The samples' codes and labels."""
        # The Parquet files are those of a folder of codes with the one split "samples".
        return codes.Codes(self.found, self.levels, self.classes, self.found.meta["vqvae"]).split("samples")

    @property
    def labels(self) -> np.ndarray:
        return self.drawn.labels

    def images(self, start: int, stop: int) -> np.ndarray:
        """Decode samples [start, stop) to (N, H, W, 3) uint8."""
        images: list[np.ndarray] = []
        for name in sorted(name for name in self.found.files if name.endswith(".tar")):
            with tarfile.open(self.found.path(name)) as tar:
                for member in tar:
                    stem, _, extension = member.name.partition(".")
                    if extension == "png" and stem.isdecimal() and start <= int(stem) < stop:
                        file = tar.extractfile(member)
                        assert file is not None
                        with Image.open(io.BytesIO(file.read()), formats=("PNG",)) as image:
                            images.append(np.asarray(image.convert("RGB")))
        if len(images) != stop - start:
            raise UserError(
                f"{len(images)} of the samples {start} to {stop - 1} were found.",
                where=self.found.folder,
                fix="Run: vqvae2 run --stage sample --force",
                code=4,
            )
        return np.stack(images)


def open_samples(folder: Path) -> Samples:
    """Open a folder of samples."""
    found = artifact.read(folder, KIND, "sample")
    meta = found.meta
    levels = {name: Grid(**shape) for name, shape in meta["levels"].items()}
    return Samples(found, meta["count"], tuple(meta["classes"]), meta["image_size"], levels)
