"""Presets of conf/experiment/ and the images that they fit."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.checks.machine import gpu_count
from pipeline.compose import compose_params
from pipeline.composed_from import CONF, choices_of, format_override, key_of, overrides_of
from pipeline.group_files import default_choice
from stages.config import Params
from stages.errors import UserError
from stages.tracking.quantities import format_number

FEW_IMAGES = 1000  # below, the priors repeat training images
MIN_PASSES = 3  # of the VQ-VAE over the training images
_DATASET_SETTINGS = ("source", "labels", "validation_fraction", "resize_mode", "background")  # repeated in a command


class Preset(NamedTuple):
    """A preset for photographs of any dataset."""

    name: str
    image_size: int
    largest_size: int  # that it is recommended for
    requires_gpu: bool


PHOTO_PRESETS = (
    Preset("photos32", 32, 48, requires_gpu=False),
    Preset("photos64", 64, 96, requires_gpu=False),
    Preset("photos128", 128, 192, requires_gpu=True),
    Preset("photos256", 256, 10**6, requires_gpu=True),
)
_PHOTO_PRESET_NAMES = {preset.name for preset in PHOTO_PRESETS}


class Images(NamedTuple):
    """Name and size of the images of some settings."""

    name: str
    image_size: int

    def __str__(self) -> str:
        return f"{self.name} at {self.image_size} pixels"


@dataclass(frozen=True)
class PresetFit:
    """Preset that settings are composed with, the images that it is made for, and those of the settings."""

    experiment: str
    made_for: Images
    images: Images

    @property
    def fits(self) -> bool:
        """True if the settings have the images of the preset, or the size of a photo preset."""
        same_name = self.made_for.name == self.images.name or self.experiment in _PHOTO_PRESET_NAMES
        return same_name and self.made_for.image_size == self.images.image_size

    def __str__(self) -> str:
        return (
            f"networks, steps and sampling without an override are those of experiment={self.experiment}, which is "
            f"made for {self.made_for}, not for {self.images}"
        )


@dataclass(frozen=True)
class Advice:
    """Fit of the current preset, and the command that is recommended for the images and this machine."""

    fit: PresetFit
    overrides: Sequence[str]  # recommended
    remarks: Sequence[str]

    @property
    def command(self) -> str:
        """The recommended command."""
        return _command(self.overrides)

    def lines(self) -> list[str]:
        """Return the lines of `vqvae2 plan`."""
        fit = f"experiment={self.fit.experiment} is made for these images" if self.fit.fits else str(self.fit)
        return [f"preset: {fit}", *self.remarks, f"recommended: {self.command}"]


def fit_of(data: Mapping[str, Any], settings: Params, conf: Path = CONF) -> PresetFit:
    """Compare the images of settings with those of their preset. `data` are the contents of params.yaml."""
    experiment = choices_of(data).get("experiment") or default_choice(conf, "experiment")
    dataset = compose_params([format_override("experiment", experiment)], conf)["dataset"]
    made_for = Images(dataset["name"], dataset["image_size"])
    return PresetFit(str(experiment), made_for, Images(settings.dataset.name, settings.dataset.image_size))


def warn_kept(data: Mapping[str, Any], settings: Params, *, gpus: int | None = None) -> None:
    """Print in one line which preset is kept for images of another dataset, and which command is recommended.

    `gpus` are those of this machine by default. Nothing depends on the line, so it raises no UserError.
    """
    if any(key_of(override).partition(".")[0] == "dataset" for override in overrides_of(data)):
        advice = try_advise(data, settings, gpus=gpu_count() if gpus is None else gpus)
        if advice is not None and not advice.fit.fits:
            print(f"note: {advice.fit}. Recommended: {advice.command}", file=sys.stderr)


def try_advise(
    data: Mapping[str, Any], settings: Params, *, gpus: int, num_train_images: int | None = None
) -> Advice | None:
    """Recommend a preset as `advise` does, or print a note why none can be recommended and return None."""
    try:
        return advise(data, settings, gpus=gpus, num_train_images=num_train_images)
    except UserError as error:  # conf/ no longer has a preset, for example
        print(f"note: no preset can be recommended: {error.what}", file=sys.stderr)
        return None


def advise(
    data: Mapping[str, Any], settings: Params, *, gpus: int, num_train_images: int | None = None, conf: Path = CONF
) -> Advice:
    """Recommend a preset by image size, number of training images (None: unknown) and GPUs of this machine."""
    fit = fit_of(data, settings, conf)
    remarks = []
    steps, batch_size = settings.train_vqvae.steps, settings.train_vqvae.batch_size
    if num_train_images:
        remarks.append(
            f"training: {num_train_images:,} images, which the VQ-VAE sees "
            f"{format_number(steps * batch_size / num_train_images, 2)} times in {steps:,} steps of {batch_size}"
        )
    if fit.fits:
        chosen = overrides_of(data)
        if any(config.gpus_per_worker for config in settings.cluster.variants()) and not gpus:
            others, _ = _photo_preset(data, gpus, conf)
            remarks.append(f"It needs a GPU, which this machine does not have. Without one: {_command(others)}")
    else:
        chosen, reasons = _photo_preset(data, gpus, conf)
        remarks += reasons
    if num_train_images:
        train = compose_params(chosen, conf)["train_vqvae"]
        needed_steps = -(-MIN_PASSES * num_train_images // train["batch_size"])
        if needed_steps > train["steps"]:
            remarks.append(f"With {train['steps']:,} steps, it would see each image less than {MIN_PASSES} times.")
            chosen.append(f"train_vqvae.steps={needed_steps}")
        if num_train_images < FEW_IMAGES:
            remarks.append(
                f"{num_train_images} training images are few: the priors will repeat them. The report shows the "
                "training images nearest to the samples."
            )
    return Advice(fit, chosen, remarks)


def _photo_preset(data: Mapping[str, Any], gpus: int, conf: Path) -> tuple[list[str], list[str]]:
    """Return the overrides of the photo preset for an image size, and the reasons for another size."""
    size, reasons = data["dataset"]["image_size"], []
    preset = next(preset for preset in PHOTO_PRESETS if size <= preset.largest_size)
    if preset.requires_gpu and not gpus:
        reasons.append(f"{size} pixels need a GPU, which this machine does not have. On one: experiment={preset.name}")
        preset = next(preset for preset in reversed(PHOTO_PRESETS) if not preset.requires_gpu)
        size = preset.image_size
    chosen = [f"experiment={preset.name}", *_dataset_overrides(data)]
    stride = max(level["stride"] for level in compose_params(chosen, conf)["vqvae"]["levels"].values())
    size = max(stride, round(size / stride) * stride)
    return chosen + ([f"dataset.image_size={size}"] if size != preset.image_size else []), reasons


def _dataset_overrides(data: Mapping[str, Any]) -> list[str]:
    """Return the overrides that name the images, without their size."""
    keys = {key_of(override) for override in overrides_of(data)}
    choice = choices_of(data).get("dataset", "folder")
    chosen = [format_override("dataset", choice)] if "dataset" in keys and choice != "folder" else []
    names = [name for name in _DATASET_SETTINGS if f"dataset.{name}" in keys or (name == "source" and not chosen)]
    return chosen + [format_override(f"dataset.{name}", data["dataset"][name]) for name in names]


def _command(overrides: Sequence[str]) -> str:
    return " ".join(["vqvae2 run", *(f"-S {shlex.quote(override)}" for override in overrides)])
