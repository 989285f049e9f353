"""`vqvae2 init`: create a project for a folder of images, outside of the repository."""

import dataclasses
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import conf_layers, conflicts, new_project, params, presets
from pipeline.checks.machine import gpu_count
from pipeline.compose import compose_params
from pipeline.composed_from import format_override
from stages.config import DatasetConfig
from stages.errors import UserError
from stages.images import overview
from stages.images.listing import Listing, list_images
from stages.images.sources import open_source
from stages.tracking.console import ConsoleReporter

DEFAULT_SOURCE = "data/images"  # without --data
DEFAULT_PRESET = "photos64"  # without images: it needs no GPU
README_SETTINGS = """\
Settings: `conf/dataset/mine.yaml` names the images, and `conf/experiment/mine.yaml` the preset. After an edit, run
`vqvae2 config --write` to renew `params.yaml`. A file in `conf/` replaces the file of the same name in the package.

To track images inside of this folder with DVC: `dvc add data/images`."""
HEADERS_READ = 200  # images whose sizes are read, to recommend a preset


class ChosenPreset(NamedTuple):
    """Preset of a new project, settings that override it by section, and the reasons."""

    preset: str
    changes: dict[str, dict[str, Any]]
    reasons: Sequence[str]


def run(folder: Path, *, data: Path | None, preset: str, gpus: int | None = None) -> int:
    """Create a project in a folder, which may have other files; return the exit status.

    `data` is a folder, zip or tar of images. Without `preset`, one is recommended for them and this machine, whose GPUs
    are counted by default. Raises UserError if the images or the preset cannot be used, or if the folder has files that
    would be replaced.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError("The project must be a folder, got a file.", where=folder, fix="Choose another name.", code=2)
    names = conf_layers.choices(conf_layers.PACKAGED, "experiment")
    if preset and preset not in names:
        raise UserError(
            f"{preset} is not a valid preset.", where="--preset", fix=f"Use one of: {', '.join(names)}", code=2
        )
    new_project.require_addable(folder)
    source, lines = DEFAULT_SOURCE, []
    chosen = ChosenPreset(preset or DEFAULT_PRESET, {}, ())
    if data is not None:
        if data.is_dir() and folder.resolve().is_relative_to(data.resolve()):
            raise UserError(
                "The project must be outside of its images, because it writes files.",
                where=folder,
                fix="Choose another folder for the project, or move the images into a folder below it.",
                code=2,
            )
        source = source_path(data, folder)
        dataset = _dataset(source)
        listing = list_images(data, dataset.labels, validation_fraction=dataset.validation_fraction)
        lines = overview.describe(listing)
        if not preset:
            chosen = recommend(data, listing, dataset, gpu_count() if gpus is None else gpus)
    name = project_name(folder)
    primary_config = new_project.PRIMARY_CONFIG.format(defaults=new_project.OWN_DEFAULTS)
    with new_project.temporary_project(name, primary_config, README_SETTINGS) as project:
        image_size = compose_params([f"experiment={chosen.preset}"], conf_layers.PACKAGED)["dataset"]["image_size"]
        changes = {"dataset": {"image_size": image_size}} | chosen.changes
        new_project.write_settings(project, {"name": name, "source": source}, chosen.preset, changes)
        new_project.compose(project)
        folder.mkdir(parents=True, exist_ok=True)
        written = new_project.add(project, folder)
    is_committed = new_project.initialize_git(folder, written)
    print("\n".join([*lines, f"Preset: {chosen.preset}.", *chosen.reasons, ""]))
    print(f"project   {folder}")
    if data is None:
        print(f"images    put them into {folder / source}, or set `source` in {folder}/conf/dataset/mine.yaml")
    if not is_committed and (folder / ".git").exists():
        print(new_project.COMMIT_HINT)
    print(f"next      cd {shlex.quote(str(folder))} && vqvae2 run")
    return 0


def recommend(data: Path, listing: Listing, dataset: DatasetConfig, gpus: int) -> ChosenPreset:
    """Recommend a preset for images by their sizes, their number and the GPUs."""
    images = overview.sample_images(listing.images, HEADERS_READ)
    with ConsoleReporter("init") as reporter:
        scan = overview.scan(
            open_source(data),
            images,
            dataset,
            find_copies=False,
            progress=lambda done, total: reporter.progress(done, total, "images", {}),
        )
    if not scan.widths:
        raise UserError(
            f"None of {scan.checked} images can be used, such as {': '.join(scan.rejected[0])}.",
            where=data,
            fix="See which files are rejected, and why: vqvae2 data",
            code=4,
        )
    side = min(overview.quantiles(scan.widths)[1], overview.quantiles(scan.heights)[1])
    sizes = [photo.image_size for photo in presets.PHOTO_PRESETS]
    size = max([size for size in sizes if size <= side], default=min(sizes))
    conf = conf_layers.PACKAGED
    composed = compose_params(
        ["dataset=folder", format_override("dataset.source", dataset.source), f"dataset.image_size={size}"], conf
    )
    advice = presets.advise(
        composed,
        params.check(composed, data),
        gpus=gpus,
        num_train_images=overview.count_splits(listing)["train"],
        conf=conf,
    )
    return to_chosen_preset(advice)


def to_chosen_preset(advice: presets.Advice) -> ChosenPreset:
    """Convert recommended overrides into a preset and settings that override it."""
    preset, changes = "", dict[str, dict[str, Any]]()
    for override in advice.overrides:
        key, _, value = override.partition("=")
        section, _, setting = key.partition(".")
        if key == "experiment":
            preset = value
        elif key in ("dataset.image_size", "train_vqvae.steps"):
            changes.setdefault(section, {})[setting] = int(value)
    return ChosenPreset(preset, changes, [remark for remark in advice.remarks if not remark.startswith("training:")])


def source_path(data: Path, folder: Path) -> str:
    """Return the path of the images as the project names it: relative inside of its folder, absolute elsewhere."""
    if conflicts.URL.match(str(data)):
        return str(data)  # refused by the validation of settings
    path, root = data.absolute(), folder.absolute()
    if not path.is_relative_to(root):
        path, root = path.resolve(), root.resolve()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def project_name(folder: Path) -> str:
    """Return the name of a project by its folder: letters, digits, - and _."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", folder.resolve().name).strip("_") or "images"


def _dataset(source: str) -> DatasetConfig:
    """Return the dataset of a project with other settings as in the group's file `folder`. Validates the path."""
    composed = compose_params(
        ["dataset=folder", format_override("dataset.source", source), "dataset.image_size=64"], conf_layers.PACKAGED
    )
    return dataclasses.replace(params.check(composed, "--data").dataset)
