"""Draw images from the priors: codes level by level, coarse to fine, then pixels.

reads   vqvae    trained VQ-VAE                     formats/model_file.py
        priors   a trained prior per level          formats/model_file.py
writes  out      samples and their codes            formats/samples.py
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
from stages.formats.codes import write_part
from stages.formats.samples import KIND, places, read_image
from stages.formats.shards import Encoded, write_shard
from stages.images.contact_sheet import contact_sheet, png, to_uint8
from stages.mapping.parts import map_parts
from stages.runtime.context import StageContext

SHOWN = 64  # samples on the grid picture
GOLDEN = 0.6180339887498949  # its multiples, less their whole parts, fall evenly however many are taken


def run(vqvae: Path, priors: Path, out: Path, *, sample: SampleConfig, seed: int, context: StageContext) -> None:
    """Draw the configured number of samples, in parts that are kept as they are finished."""
    models = Models.load(vqvae, priors)
    labels = choose_labels(models, sample)
    parts = [
        {"number": number, "start": start, "labels": chosen, "weight": len(chosen)}
        for number, start in enumerate(range(0, sample.count, sample.images_per_part))
        for chosen in [labels[start : start + sample.images_per_part].tolist()]
    ]
    work = context.work / "parts"
    work.mkdir(parents=True, exist_ok=True)
    arguments = (vqvae.absolute(), priors.absolute(), sample, seed, work.absolute())
    written = map_parts(Draw, arguments, parts, context=context, unit="sample")

    meta = {
        "count": sample.count,
        "classes": list(models.classes),
        "image_size": models.image_size,
        "levels": {level: grid._asdict() for level, grid in models.grids.items()},
        "temperature": sample.temperature,
        "top_k": sample.top_k,
        "top_p": sample.top_p,
        "accepted": 1.0,  # share of the drawn samples that are kept: none is rejected
        "vqvae": models.digests["vqvae"],
        "priors": {level: models.digests[level] for level in models.priors},
    }
    with artifact.commit_folder(out, KIND, meta) as folder:
        for result in written:
            for name in result["files"]:
                artifact.link_or_copy(work / name, folder / name)
        first = written[: math.ceil(SHOWN / sample.images_per_part)]
        found = places(folder / name for result in first for name in result["files"] if name.endswith(".tar"))
        shown = np.stack([read_image(found[number]) for number in range(min(SHOWN, sample.count))])
        columns = len(sample.classes) or min(len(shown), 8)
        (folder / "grid.png").write_bytes(contact_sheet(shown, columns=columns))
    context.reporter.picture("samples", (out / "grid.png").read_bytes(), 0)


class Models:
    """Everything that sampling needs, and that it all belongs together."""

    def __init__(self, vqvae: VQVAE, priors: Mapping[str, Prior], meta: Mapping[str, Any], digests: Mapping[str, str]):
        self.vqvae, self.priors, self.digests = vqvae, priors, digests
        self.image_size: int = meta["image_size"]
        self.classes: tuple[str, ...] = tuple(meta["classes"])
        self.label_counts: list[int] = meta["label_counts"]
        self.grids = {level: Grid(prior.entries, prior.height, prior.width) for level, prior in priors.items()}
        self._samplers: dict[tuple[str, SampleConfig], Sampler] = {}  # each keeps its caches from draw to draw

    @classmethod
    def load(cls, vqvae: Path, priors: Path) -> "Models":
        """Load a VQ-VAE and the prior of each of its levels; refuse priors of another VQ-VAE's codes."""
        network, found = model_file.load_vqvae(vqvae)
        loaded, digests, counts = {}, {"vqvae": found.digest}, []
        for level in network.config.levels:
            prior, prior_found = model_file.load_prior(priors / level, level)
            if prior_found.meta["vqvae"] != found.digest:
                raise UserError(
                    f"The prior of level {level} learnt codes of VQ-VAE {prior_found.meta['vqvae'][:12]}, "
                    f"but this one is {found.digest[:12]}.",
                    where=priors / level,
                    fix=f"Run: vqvae2 run --stage prior_{level}",
                    code=5,
                )
            loaded[level], digests[level] = prior, prior_found.digest
            counts = prior_found.meta["label_counts"]
        return cls(network, loaded, {**found.meta, "label_counts": counts}, digests)

    def to(self, device: torch.device) -> "Models":
        """Move every network."""
        for network in (self.vqvae, *self.priors.values()):
            network.to(device)
        return self

    @torch.inference_mode()
    def draw(
        self,
        numbers: Sequence[int],
        labels: Sequence[int],
        config: SampleConfig,
        seed: int,
        given: Mapping[str, Tensor] | None = None,
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Draw the samples of these numbers: codes of each level, and images (N, H, W, 3) of bytes.

        A sample depends on its number, its label, `seed` and the models alone. `given` holds codes of the coarsest
        levels to start from.
        """
        device = next(self.vqvae.parameters()).device
        codes: dict[str, Tensor] = {level: grid.to(device) for level, grid in (given or {}).items()}
        for place, (level, prior) in enumerate(self.priors.items()):
            if level in codes:
                continue
            if (level, config) not in self._samplers:
                self._samplers[level, config] = _sampler(prior, config)
            codes[level] = self._samplers[level, config].draw(
                seed=seed + place,
                numbers=torch.tensor(numbers),
                coarser=dict(codes),
                labels=torch.tensor(labels, device=device) if self.classes else None,
            )
        images = to_uint8(self.vqvae.decode(codes).float().cpu().numpy())
        return {level: grid.cpu().numpy().astype(np.uint16) for level, grid in codes.items()}, images


def _sampler(prior: Prior, config: SampleConfig) -> Sampler:
    return Sampler(
        prior,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        method=config.method,
        batch_size=config.batch_size,
    )


def choose_labels(models: Models, config: SampleConfig) -> np.ndarray:
    """Give each sample its label: the named classes in turn, or each class as often as training images have it."""
    if not models.classes:
        if config.classes:
            raise UserError(
                "These priors were trained without classes, so none can be asked for.",
                where="sample.classes",
                fix="Leave it empty, or train on labelled images.",
                code=2,
            )
        return np.full(config.count, -1)
    if config.classes:
        unknown = [name for name in config.classes if name not in models.classes]
        if unknown:
            raise UserError(
                f"{unknown[0]!r} is no class of these models.",
                where="sample.classes",
                fix=f"Use one of: {', '.join(models.classes)}",
                code=2,
            )
        return np.resize([models.classes.index(name) for name in config.classes], config.count)
    shares = np.cumsum(models.label_counts) / np.sum(models.label_counts)
    return np.searchsorted(shares, np.arange(config.count) * GOLDEN % 1, side="right")


class Draw:
    """A worker's own models: built once, called on every range of samples."""

    def __init__(self, vqvae: Path, priors: Path, config: SampleConfig, seed: int, out: Path):
        self.models = Models.load(vqvae, priors).to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        self.config, self.seed, self.out = config, seed, out

    def __call__(self, part: dict[str, Any]) -> dict[str, Any]:
        files = [f"samples-{part['number']:05d}.{extension}" for extension in ("parquet", "tar")]
        paths = [self.out / name for name in files]
        if not all(map(artifact.is_sealed, paths)):
            self._write(part["start"], part["labels"], *paths)
            for path in paths:
                artifact.seal(path)
        return {"files": files}

    def _write(self, start: int, labels: list[int], codes_path: Path, images_path: Path) -> None:
        batches = [
            self.models.draw(range(start + first, start + first + len(chosen)), chosen, self.config, self.seed)
            for first in range(0, len(labels), self.config.batch_size)
            for chosen in [labels[first : first + self.config.batch_size]]
        ]
        codes = {level: np.concatenate([codes[level] for codes, _ in batches]) for level in self.models.priors}
        images = np.concatenate([images for _, images in batches])
        keys = [f"{start + place:09d}" for place in range(len(labels))]
        write_part(
            codes_path,
            self.models.grids,
            codes,
            np.array(labels),
            np.zeros(len(labels)),
            keys,
            {"vqvae": self.models.digests["vqvae"]},
        )
        self._write_images(images_path, keys, images, labels)

    def _write_images(self, path: Path, keys: list[str], images: np.ndarray, labels: list[int]) -> None:
        classes = self.models.classes
        encoded = [
            Encoded(key, png(image), "png", label, {"class": classes[label]} if classes else {})
            for key, image, label in zip(keys, images, labels, strict=True)
        ]
        with artifact.atomic_write(path) as temporary:
            write_shard(temporary, encoded)
