"""Draw samples from the priors: codes level by level, coarse to fine, then pixels.

reads   vqvae    trained VQ-VAE                     formats/model_file.py
        priors   a trained prior per level          formats/model_file.py
writes  out      samples and their codes            formats/samples.py

Axes: N samples, H x W pixels or grid of codes, 3 RGB channels.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from stages.config import SampleConfig
from stages.formats import artifact
from stages.formats.codes import write_codes_file
from stages.formats.samples import KIND, index_tars, read_image
from stages.formats.shards import EncodedImage, write_shard
from stages.images.contact_sheet import contact_sheet, encode_png
from stages.inference.trained_models import TrainedModels, choose_labels
from stages.mapping.parts import map_parts
from stages.runtime.context import StageContext
from stages.runtime.device import best_device

SHOWN_SAMPLES = 64  # on the contact sheet
SHOWN_COLUMNS = 8  # of the contact sheet, if no classes are configured


def run(vqvae: Path, priors: Path, out: Path, *, sample: SampleConfig, seed: int, context: StageContext) -> None:
    """Draw `sample.count` samples. Raises UserError if models are missing or do not match, or a class is unknown."""
    models = TrainedModels.load(vqvae, priors)
    models.require_drawable(sample, where="sample")
    work = context.work_dir / "parts"
    work.mkdir(parents=True, exist_ok=True)
    arguments = (vqvae.absolute(), priors.absolute(), sample, seed, work.absolute())
    results = map_parts(Draw, arguments, _parts(choose_labels(models, sample), sample), context=context, unit="sample")

    meta = {
        "count": sample.count,
        "classes": list(models.classes),
        "image_size": models.image_size,
        "levels": {level: grid._asdict() for level, grid in models.grids.items()},
        **sample.describe_rule(),
        "accepted": 1.0,  # fraction of the drawn samples that is kept: there is no rejection sampling
        "vqvae": models.digests["vqvae"],
        "priors": {level: models.digests[level] for level in models.priors},
    }
    with artifact.commit_folder(out, KIND, meta) as folder:
        for result in results:
            for name in result["files"]:
                artifact.link_or_copy(work / name, folder / name)
        _write_contact_sheet(folder, results, sample)
    context.reporter.image("samples", (out / "grid.png").read_bytes(), 0)


def _parts(labels: np.ndarray, sample: SampleConfig) -> list[dict[str, Any]]:
    """Describe one part per file of samples."""
    parts = []
    for number, start in enumerate(range(0, sample.count, sample.images_per_part)):
        part_labels = labels[start : start + sample.images_per_part].tolist()
        parts.append({"number": number, "start": start, "labels": part_labels, "weight": len(part_labels)})
    return parts


class Draw:
    """Mapper that draws the samples of one part, with models loaded once per process."""

    def __init__(self, vqvae: Path, priors: Path, config: SampleConfig, seed: int, out: Path):
        self.models = TrainedModels.load(vqvae, priors).to(best_device())
        self.config, self.seed, self.out = config, seed, out

    def __call__(self, part: dict[str, Any]) -> dict[str, Any]:
        files = [f"samples-{part['number']:05d}.{extension}" for extension in ("parquet", "tar")]
        paths = [self.out / name for name in files]
        if not all(map(artifact.has_valid_checksum, paths)):
            self._write(part["start"], part["labels"], *paths)
            for path in paths:
                artifact.write_checksum(path)
        return {"files": files}

    def _write(self, start: int, labels: list[int], codes_path: Path, images_path: Path) -> None:
        """Draw samples `start`, `start` + 1, ... of these labels; write their codes and images."""
        batches = []
        for first in range(0, len(labels), self.config.batch_size):
            batch_labels = labels[first : first + self.config.batch_size]
            sample_ids = range(start + first, start + first + len(batch_labels))
            batches.append(self.models.draw(sample_ids, batch_labels, self.config, self.seed))
        codes = {level: np.concatenate([codes[level] for codes, _ in batches]) for level in self.models.priors}
        images = np.concatenate([images for _, images in batches])
        keys = [f"{start + index:09d}" for index in range(len(labels))]
        write_codes_file(
            codes_path,
            self.models.grids,
            codes,
            np.array(labels),
            np.zeros(len(labels)),  # no augmented copies
            keys,
            {"vqvae": self.models.digests["vqvae"]},
        )
        self._write_images(images_path, keys, images, labels)

    def _write_images(self, path: Path, keys: list[str], images: np.ndarray, labels: list[int]) -> None:
        classes = self.models.classes
        encoded = [
            EncodedImage(key, encode_png(image), "png", label, {"class": classes[label]} if classes else {})
            for key, image, label in zip(keys, images, labels, strict=True)
        ]
        with artifact.atomic_write(path) as temporary:
            write_shard(temporary, encoded)


def _write_contact_sheet(folder: Path, results: list[dict[str, Any]], sample: SampleConfig) -> None:
    """Write the first samples as grid.png, one column per configured class."""
    first_results = results[: math.ceil(SHOWN_SAMPLES / sample.images_per_part)]
    members = index_tars(folder / name for result in first_results for name in result["files"] if name.endswith(".tar"))
    images = np.stack([read_image(members[number]) for number in range(min(SHOWN_SAMPLES, sample.count))])
    columns = len(sample.classes) or min(len(images), SHOWN_COLUMNS)
    (folder / "grid.png").write_bytes(contact_sheet(images, columns=columns))
