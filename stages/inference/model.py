"""Trained model in memory: the methods of the Python API, which the commands `score` and `restore` also use.

Axes: N images, H x W codes of a level, S pixels along each side of an image.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, Unpack

import numpy as np
import torch
from torch import Tensor

from models import restoration
from models.priors import Grid, Prior
from models.sampling import SamplingRule
from models.vqvae import VQVAE
from stages.config import SampleConfig
from stages.errors import UserError
from stages.images.tensors import to_float, to_uint8
from stages.inference.batches import CodeGrids, code_batches, concatenate, slices
from stages.inference.folder import find_model, load_parts, sampling_rule
from stages.inference.images import ImageFormat, Images, OneImage, from_pixels, image_settings, to_pixels
from stages.inference.inputs import (
    Labels,
    Threshold,
    check_codes,
    check_labels,
    check_names,
    check_prefix,
    check_rows,
    check_thresholds,
)
from stages.inference.likelihood import code_nll, infer_labels
from stages.inference.sampling_options import SamplingOptions, apply_options
from stages.inference.scores import Scores
from stages.inference.trained_models import TrainedModels, choose_labels
from stages.runtime.device import best_device
from stages.tracking import registry

BATCH_SIZE = SampleConfig.batch_size  # images per forward pass


def load_model(folder: Path | str = "artifacts", *, device: torch.device | str | None = None) -> "Model":
    """Load a trained model. The device defaults to CUDA if there is a GPU, else the CPU.

    `folder` holds `vqvae/` and `priors/`, as `artifacts/` of a project or an exported model does, or is such a project.
    It may also be the URI of a model in MLflow, such as models:/vqvae2@champion. Without `priors/`, the model encodes
    and decodes only. Raises UserError if a part is missing, damaged or does not match the others.
    """
    if isinstance(folder, str) and folder.startswith(registry.URI_SCHEMES):
        with registry.downloaded_model(folder) as downloaded:
            return Model.open(find_model(downloaded), device=device, name=folder)
    return Model.open(find_model(Path(folder)), device=device)


class Model:
    """Trained VQ-VAE and its priors.

    Images are given as a list of paths, PIL images or uint8 arrays (H, W, 3), as a uint8 array (N, H, W, 3), or as a
    tensor of floats in [-1, 1], (N, 3, H, W); one image alone counts as a list of one. Other sizes are cropped and
    resized as the training images were. Images are returned as PIL images, or with `format` "numpy" or "torch" as
    uint8 arrays (N, H, W, 3) or such a tensor.

    `labels` are names or indices of classes, one per image. Where they are None, each image gets the class that its
    codes are most probable under. Models without classes need none.

    Methods that draw codes take the sampling rule as keyword arguments (SamplingOptions). It defaults to the rule of
    the samples in the model's folder, and for restoration to temperature 1 without top-k and top-p.
    """

    def __init__(self, folder: Path, models: TrainedModels, name: str = "") -> None:
        self.folder, self._models = Path(name or folder), models
        self._rule = sampling_rule(folder)
        self._settings = image_settings(models.meta)
        self.image_size, self.classes, self.digests = models.image_size, models.classes, models.digests
        sides = models.vqvae.config.grids(self.image_size)
        self.levels = {
            name: Grid(level.entries, sides[name], sides[name]) for name, level in models.vqvae.config.levels.items()
        }

    @classmethod
    def open(cls, folder: Path, *, device: torch.device | str | None = None, name: str = "") -> Self:
        """Load the model of a folder that holds `vqvae/`, and `priors/` if it has any. It is shown as `name`."""
        models = load_parts(folder).to(best_device() if device is None else torch.device(device))
        return cls(folder, models, name)

    def __repr__(self) -> str:
        grids = ", ".join(f"{level} {grid.height} x {grid.width}" for level, grid in self.levels.items())
        return f"<vqvae2.Model {self.folder}: {self.image_size} pixels, {grids}, {len(self.classes)} classes>"

    @property
    def device(self) -> torch.device:
        """Device of the networks."""
        return next(self.vqvae.parameters()).device

    @property
    def vqvae(self) -> VQVAE:
        """PyTorch module of the VQ-VAE."""
        return self._models.vqvae

    @property
    def priors(self) -> Mapping[str, Prior]:
        """PyTorch modules of the priors, by level, coarse to fine."""
        return self._models.priors

    def sample(
        self,
        count: int = 16,
        *,
        classes: Sequence[str] = (),
        seed: int = 0,
        format: ImageFormat = "pil",
        **options: Unpack[SamplingOptions],
    ) -> Any:
        """Draw images from the priors: those that `vqvae2 sample` draws with the same seed and options.

        `classes` are drawn in turn; without any, all are drawn as frequently as in the training images. Raises
        UserError for an unknown class and ValueError for an option out of range.
        """
        codes = self.sample_codes(count, classes=classes, seed=seed, **options)
        return self.decode(codes, format=format)

    def sample_codes(
        self,
        count: int = 16,
        *,
        classes: Sequence[str] = (),
        seed: int = 0,
        **options: Unpack[SamplingOptions],
    ) -> CodeGrids:
        """Draw the codes of images, as `sample` does."""
        models = self._with_priors()
        config = dataclasses.replace(
            self._apply(options, self._rule), count=count, classes=check_names(classes, "classes")
        )
        labels = choose_labels(models, config, where="classes").tolist()
        batches = [
            models.draw_codes(range(start, start + len(batch)), batch, config, seed)
            for start, batch in slices(labels, config.batch_size)
        ]
        return concatenate(batches)

    def read(self, images: Images) -> np.ndarray:
        """Convert images to what the VQ-VAE reads, uint8 (N, S, S, 3). Raises errors as `encode` does."""
        return to_pixels(images, self._settings)

    def encode(self, images: Images) -> CodeGrids:
        """Encode images as codes, level by level: {"top": (N, H, W), "bottom": ...}, coarse to fine.

        Raises UserError for a file that cannot be read and ValueError for anything else that is no image.
        """
        pixels, batches = self.read(images), []
        for _, batch in slices(pixels, BATCH_SIZE):
            with torch.inference_mode():
                batches.append(self.vqvae.encode(to_float(torch.from_numpy(batch), self.device)))
        return concatenate(batches)

    def decode(
        self, codes: Mapping[str, np.ndarray], *, levels: Sequence[str] | None = None, format: ImageFormat = "pil"
    ) -> Any:
        """Decode codes to images, by default those of all levels in `codes`.

        `levels` is a prefix of the model's levels, coarse to fine: the finer ones are left out. Raises ValueError for
        codes that do not fit the model.
        """
        prefix = check_prefix(list(codes) if levels is None else levels, list(self.levels))
        grids = check_codes(
            {level: codes[level] for level in prefix if level in codes},
            {level: self.levels[level] for level in prefix},
            self.device,
        )
        pixels = []
        for batch in code_batches(grids, BATCH_SIZE):
            with torch.inference_mode():
                pixels.append(to_uint8(self.vqvae.decode(batch).float().cpu().numpy()))
        return from_pixels(np.concatenate(pixels), format, self.device)

    def score(self, images: Images, *, labels: Labels = None) -> Scores:
        """Compute how unlikely the codes of images are: `score_codes` of their codes."""
        return self.score_codes(self.encode(images), labels=labels)

    def score_codes(self, codes: Mapping[str, np.ndarray], *, labels: Labels = None) -> Scores:
        """Compute the negative log-likelihood of each code, given the earlier and the coarser codes and the label.

        Raises ValueError for codes or labels that do not fit the model.
        """
        models, maps, used_labels = self._with_priors(), [], []
        for batch, batch_labels in self._labelled_batches(codes, labels):
            maps.append(code_nll(models, batch, batch_labels))
            used_labels.append(
                np.full(len(next(iter(batch.values()))), -1) if batch_labels is None else batch_labels.cpu().numpy()
            )
        return Scores(concatenate(maps), np.concatenate(used_labels), self.image_size)

    def restore(
        self,
        images: Images,
        *,
        threshold: Threshold = None,
        seed: int = 0,
        labels: Labels = None,
        format: ImageFormat = "pil",
        **options: Unpack[SamplingOptions],
    ) -> Any:
        """Replace the unlikely codes of images and decode: `restore_codes` of their codes, as images."""
        codes = self.restore_codes(
            self.encode(images),
            threshold=threshold,
            seed=seed,
            labels=labels,
            **options,
        )
        return self.decode(codes, format=format)

    def restore_codes(
        self,
        codes: Mapping[str, np.ndarray],
        *,
        threshold: Threshold = None,
        seed: int = 0,
        labels: Labels = None,
        **options: Unpack[SamplingOptions],
    ) -> CodeGrids:
        """Draw each code again whose negative log-likelihood exceeds `threshold`, in nats, and copy the others.

        Coarse to fine and in raster order; each code is compared given the codes restored before it. `threshold` is a
        number or a mapping with one per level. By default it is ln K for a level of K entries: codes that are less
        probable than a uniform choice are drawn again. Raises ValueError for codes, labels or a threshold that do not
        fit the model.
        """
        models, thresholds = self._with_priors(), check_thresholds(threshold, self.levels)
        config = self._apply(options, SampleConfig())
        rules = {level: config.rule(level) for level in models.priors}
        if any(rule.pop("guidance") != 1 for rule in rules.values()):
            raise ValueError("guidance must be 1 for restoration, which compares codes without guidance")
        batches, start = [], 0
        for batch, batch_labels in self._labelled_batches(codes, labels):
            count = len(next(iter(batch.values())))
            restored: dict[str, Tensor] = {}
            for index, (level, prior) in enumerate(models.priors.items()):
                restored[level] = restoration.restore(
                    prior,
                    batch[level],
                    threshold=thresholds[level],
                    seed=seed + index,  # independent noise per level, as in a draw
                    sample_ids=torch.arange(start, start + count),
                    coarser=dict(restored),
                    labels=batch_labels,
                    rule=SamplingRule(**rules[level]),
                )
            batches.append(restored)
            start += count
        return concatenate(batches)

    def complete(
        self,
        image: OneImage,
        *,
        rows: float = 0.5,
        count: int = 4,
        seed: int = 0,
        label: str | int | None = None,
        format: ImageFormat = "pil",
        **options: Unpack[SamplingOptions],
    ) -> Any:
        """Draw the lower part of an image `count` times: `complete_codes` of its codes, as images."""
        codes = self.complete_codes(
            self.encode(image),
            rows=rows,
            count=count,
            seed=seed,
            label=label,
            **options,
        )
        return self.decode(codes, format=format)

    def complete_codes(
        self,
        codes: Mapping[str, np.ndarray],
        *,
        rows: float = 0.5,
        count: int = 4,
        seed: int = 0,
        label: str | int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> CodeGrids:
        """Copy the upper rows of the codes of one image `count` times and draw the others.

        `rows` is the fraction of the rows that are copied, rounded to rows of the coarsest level. Raises ValueError for
        a fraction out of range and for the codes of several images.
        """
        prefix_rows = check_rows(rows, self.levels)
        num_images = len(next(iter(check_codes(codes, self.levels, self.device).values())))
        if num_images != 1:
            raise ValueError(f"only one image can be completed at a time, got {num_images}")
        models = self._with_priors()
        config = dataclasses.replace(self._apply(options, self._rule), count=count)
        grids, labels = next(self._labelled_batches(codes, None if label is None else [label]))
        batches = [
            models.draw_codes(
                ids,
                [-1 if labels is None else int(labels[0])] * len(ids),
                config,
                seed,
                prefix={level: grid[:1].expand(len(ids), -1, -1) for level, grid in grids.items()},
                prefix_rows=prefix_rows,
            )
            for _, ids in slices(range(count), config.batch_size)
        ]
        return concatenate(batches)

    def _with_priors(self) -> TrainedModels:
        """Return the models. Raises UserError if the priors are missing."""
        if not self._models.priors:
            raise UserError(
                "This model has no priors: it encodes and decodes only.",
                where=self.folder / "priors",
                fix="Run: vqvae2 run",
                code=4,
            )
        return self._models

    def _apply(self, options: SamplingOptions, defaults: SampleConfig) -> SampleConfig:
        """Return the settings of a draw. Raises errors as `apply_options`, UserError if they do not fit the model."""
        config = apply_options(options, defaults, entries={name: grid.entries for name, grid in self.levels.items()})
        self._models.require_drawable(config, where="sampling options")
        return config

    def _labelled_batches(
        self, codes: Mapping[str, np.ndarray], labels: Labels
    ) -> Iterator[tuple[dict[str, Tensor], Tensor | None]]:
        """Yield batches of codes on the device with their labels, inferred if there are none."""
        grids = check_codes(codes, self.levels, self.device)
        indices = check_labels(labels, self.classes, len(next(iter(grids.values()))), self.device)
        for number, batch in enumerate(code_batches(grids, BATCH_SIZE)):
            if indices is None:
                yield batch, infer_labels(self._with_priors(), batch)
            else:
                yield batch, indices[number * BATCH_SIZE : (number + 1) * BATCH_SIZE]
