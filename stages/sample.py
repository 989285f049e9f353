"""Draw samples from the priors: codes level by level, coarse to fine, then pixels.

reads   vqvae    trained VQ-VAE                     formats/model_file.py
        priors   a trained prior per level          formats/model_file.py
writes  out      samples and their codes            formats/samples.py

Axes: N samples, H x W pixels or grid of codes, 3 RGB channels.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.priors import Grid, Prior
from models.sampling import Sampler
from models.vqvae import VQVAE
from stages.config import SampleConfig
from stages.errors import UserError
from stages.formats import artifact, model_file
from stages.formats.codes import write_codes_file
from stages.formats.samples import KIND, index_tars, read_image
from stages.formats.shards import EncodedImage, write_shard
from stages.images.contact_sheet import contact_sheet, encode_png
from stages.images.tensors import to_uint8
from stages.mapping.parts import map_parts
from stages.runtime.context import StageContext
from stages.runtime.device import best_device

SHOWN_SAMPLES = 64  # on the contact sheet
SHOWN_COLUMNS = 8  # of the contact sheet, if no classes are configured
# The fractional parts of its multiples are evenly spread over [0, 1) for any count: a low-discrepancy sequence.
INVERSE_GOLDEN_RATIO = 0.6180339887498949


def run(vqvae: Path, priors: Path, out: Path, *, sample: SampleConfig, seed: int, context: StageContext) -> None:
    """Draw `sample.count` samples. Raises UserError if models are missing or do not match, or a class is unknown."""
    models = TrainedModels.load(vqvae, priors)
    work = context.work_dir / "parts"
    work.mkdir(parents=True, exist_ok=True)
    arguments = (vqvae.absolute(), priors.absolute(), sample, seed, work.absolute())
    results = map_parts(Draw, arguments, _parts(choose_labels(models, sample), sample), context=context, unit="sample")

    meta = {
        "count": sample.count,
        "classes": list(models.classes),
        "image_size": models.image_size,
        "levels": {level: grid._asdict() for level, grid in models.grids.items()},
        "temperature": sample.temperature,
        "top_k": sample.top_k,
        "top_p": sample.top_p,
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


class TrainedModels:
    """VQ-VAE and its priors, ready to sample from."""

    def __init__(self, vqvae: VQVAE, priors: Mapping[str, Prior], meta: Mapping[str, Any], digests: Mapping[str, str]):
        self.vqvae, self.priors, self.digests = vqvae, priors, digests
        self.image_size: int = meta["image_size"]
        self.classes: tuple[str, ...] = tuple(meta["classes"])
        self.label_counts: list[int] = meta["label_counts"]  # training images per class
        self.grids = {level: Grid(prior.entries, prior.height, prior.width) for level, prior in priors.items()}
        self._samplers: dict[tuple[str, SampleConfig], Sampler] = {}  # a sampler reuses its caches in later draws

    @classmethod
    def load(cls, vqvae: Path, priors: Path) -> "TrainedModels":
        """Load a VQ-VAE and the prior of each of its levels.

        Raises UserError if a model is missing or damaged, or if a prior was trained on codes of another VQ-VAE.
        """
        network, vqvae_artifact = model_file.load_vqvae(vqvae)
        loaded, digests, label_counts = {}, {"vqvae": vqvae_artifact.digest}, []
        for level in network.config.levels:
            prior, prior_artifact = model_file.load_prior(priors / level, level)
            if prior_artifact.meta["vqvae"] != vqvae_artifact.digest:
                raise UserError(
                    f"The prior of level {level} must be trained on codes of VQ-VAE {vqvae_artifact.digest[:12]}, "
                    f"got VQ-VAE {prior_artifact.meta['vqvae'][:12]}.",
                    where=priors / level,
                    fix=f"Run: vqvae2 run --stage prior_{level}",
                    code=5,
                )
            loaded[level], digests[level] = prior, prior_artifact.digest
            label_counts = prior_artifact.meta["label_counts"]
        return cls(network, loaded, {**vqvae_artifact.meta, "label_counts": label_counts}, digests)

    def to(self, device: torch.device) -> "TrainedModels":
        """Move every network to a device."""
        for network in (self.vqvae, *self.priors.values()):
            network.to(device)
        return self

    @torch.inference_mode()
    def draw(
        self, sample_ids: Sequence[int], labels: Sequence[int], config: SampleConfig, seed: int
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Draw samples: return (N, H, W) uint16 codes per level, and (N, H, W, 3) uint8 images.

        A sample depends only on its number, its label, `seed` and the models, not on the rest of the batch.
        """
        device = next(self.vqvae.parameters()).device
        codes: dict[str, Tensor] = {}
        for index, (level, prior) in enumerate(self.priors.items()):
            if (level, config) not in self._samplers:
                self._samplers[level, config] = _sampler(prior, config)
            codes[level] = self._samplers[level, config].draw(
                seed=seed + index,  # independent noise per level
                sample_ids=torch.tensor(sample_ids),
                coarser=dict(codes),
                labels=torch.tensor(labels, device=device) if self.classes else None,
            )
        images = to_uint8(self.vqvae.decode(codes).float().cpu().numpy())
        return {level: grids.cpu().numpy().astype(np.uint16) for level, grids in codes.items()}, images


def _sampler(prior: Prior, config: SampleConfig) -> Sampler:
    return Sampler(
        prior,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        method=config.method,
        batch_size=config.batch_size,
    )


def choose_labels(models: TrainedModels, config: SampleConfig) -> np.ndarray:
    """Assign a label to each sample, (count,): the configured classes in turn, or all classes at their frequency.

    The label is -1 for models without classes. Raises UserError if a configured class is unknown to the models.
    """
    if not models.classes:
        if config.classes:
            raise UserError(
                "sample.classes must be empty for models without classes, got " + ", ".join(config.classes) + ".",
                where="sample.classes",
                fix="Leave it empty, or train on labelled images.",
                code=2,
            )
        return np.full(config.count, -1)
    if config.classes:
        unknown = [name for name in config.classes if name not in models.classes]
        if unknown:
            raise UserError(
                f"{unknown[0]!r} is not a valid class of these models.",
                where="sample.classes",
                fix=f"Use any of: {', '.join(models.classes)}",
                code=2,
            )
        return np.resize([models.classes.index(name) for name in config.classes], config.count)
    # Map points in [0, 1) to classes by the cumulative frequencies: any count has nearly the training frequencies.
    cumulative = np.cumsum(models.label_counts) / np.sum(models.label_counts)
    return np.searchsorted(cumulative, np.arange(config.count) * INVERSE_GOLDEN_RATIO % 1, side="right")


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
