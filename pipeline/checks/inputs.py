"""Checks of what the stages read: images, the networks of metrics and critics, and codes that later stages need."""

import shlex
from contextlib import suppress
from pathlib import Path

from pipeline import params
from pipeline.checks.check import Answer, Request
from stages.config import INSTALLED
from stages.errors import UserError
from stages.formats import pretrained
from stages.images import listing
from stages.metrics.networks import check_packages, read_networks


def check_images(request: Request) -> Answer:
    """Check that the source of images exists and has images, if shards are to be written, and is not the project.

    A path that does not exist is refused by `open_source` in stages/images/sources.py.
    """
    dataset = request.settings.dataset
    require_project_outside(Path(dataset.source))
    if "shard" in request.stages and not request.pull:
        source = Path(dataset.source)
        require_pulled(source)
        listing.check_source(source, dataset.labels)
    return Answer(dataset.source)


def require_project_outside(source: Path) -> None:
    """Raise UserError if the source of images contains the project: DVC cannot track a folder that it writes to."""
    if source.is_dir() and Path.cwd().is_relative_to(source.resolve()):
        raise UserError(
            "The source of images contains the project.",
            where=f"dataset.source: {source}",
            fix="Move the images into a folder of their own, such as photos, and add: -S dataset.source=photos",
            code=2,
        )


def require_outside_source(out: Path, source: Path) -> None:
    """Raise UserError if an output folder is inside of the source of images, which it would change."""
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise UserError(
            "The output folder must be outside of the source of images, which this command does not change.",
            where=out,
            fix="Choose another place, such as a folder beside it.",
            code=2,
        )


def require_outside_project_source(out: Path) -> None:
    """Raise UserError if an output is inside of the source of images of the present project, if there is one."""
    source = None
    with suppress(UserError, OSError):
        source = params.look_up(params.read(), "dataset.source")
    if isinstance(source, str):
        require_outside_source(out, Path(source))


def require_pulled(source: Path) -> None:
    """Raise UserError if DVC tracks the source of images and has not fetched it."""
    if not source.exists() and (pointer := dvc_file_of(source)):
        raise UserError(
            "The source of images is tracked by DVC, and not in this folder.",
            where=source,
            fix=f"Run: {shlex.join(['dvc', 'pull', str(pointer)])}. Or add --pull to the run.",
            code=2,
        )


def dvc_file_of(path: Path) -> Path | None:
    """Return the file that `dvc add` has written for a path or one of its parents; None if there is none."""
    candidates = (parent.with_name(f"{parent.name}.dvc") for parent in (path, *path.parents) if parent.name)
    return next((candidate for candidate in candidates if candidate.is_file()), None)


READERS_OF_NETWORKS = ("evaluate", "reject")  # stages


def check_late_inputs(request: Request) -> Answer:
    """Check what only the last stages read: a run may reach them after days."""
    settings, stages = request.settings, request.stages
    networks = settings.evaluate.networks
    if any(name.startswith(READERS_OF_NETWORKS) for name in stages):
        check_packages(networks)
        if any(weights != INSTALLED for weights in networks.values()):
            # PyTorch takes seconds to import, so only a network from a file is loaded and tried.
            from stages.metrics.features import check_networks

            check_networks(read_networks(networks), settings.dataset.image_size)
    for name, classifier in settings.classifiers.items():
        is_trained = f"classifier@{name}" in stages and not request.pull
        if is_trained and classifier.network.name in pretrained.CRITIC_PACKAGES:
            pretrained.weights_file(classifier.network.name, f"classifiers.{name}.network.name")
    if "codes" in stages and settings.vqvae.quantizer.mode == "none":
        raise UserError(
            "A VQ-VAE that does not quantize has no codes.",
            where=f"{request.where}: vqvae.quantizer.mode",
            fix="Set it to ema or loss, or leave out --stage: the run then ends with a report of the reconstructions.",
            code=2,
        )
    return Answer(f"feature networks: {', '.join(networks)}")
