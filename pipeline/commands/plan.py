"""`vqvae2 plan`: parameters, FLOPs and bytes of a run, counted on the meta device without computing anything.

A level has a grid of side x side codes; side**2 codes per image.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch

from models import cost
from models.priors import Grid, build
from models.vqvae import VQVAE
from pipeline import params
from pipeline.compose import compose_settings
from pipeline.preflight import classes_of
from stages.config import DatasetConfig, Params, TrainConfig
from stages.errors import UserError
from stages.tracking.quantities import format_number


@dataclass(frozen=True)
class Training:
    """Cost of training one network."""

    stage: str
    parameters: int
    parameters_per_class: int  # additional parameters for each class of a labeled data set
    forward_flops: int  # floating-point operations of a forward pass, per image
    training_flops: int  # of the whole training; a backward pass costs two forward passes
    checkpoint_bytes: int  # float32 weights, their EMA if there is one, and Adam's two moments


def show(overrides: Sequence[str], *, as_json: bool) -> int:
    """Print the cost of composed settings, or of params.yaml without overrides; return the exit status."""
    settings = compose_settings(overrides)[1] if overrides else params.load()
    classes = count_classes(settings.dataset)
    trainings = list(count(settings, classes or 0))
    code_bytes = bytes_per_image(settings)
    if as_json:
        rows = [asdict(training) for training in trainings]
        print(json.dumps({"classes": classes, "trainings": rows, "code_bytes_per_image": code_bytes}, indent=1))
        return 0
    print(f"{'stage':<14}{'parameters':>13}{'GFLOP/image':>13}{'training TFLOP':>16}{'checkpoint MB':>15}")
    for training in trainings:
        print(
            f"{training.stage:<14}{training.parameters:>13,}{format_number(training.forward_flops / 1e9, 3):>13}"
            f"{format_number(training.training_flops / 1e12, 3):>16}{training.checkpoint_bytes / 1e6:>15,.1f}"
        )
    if classes is None:
        added = ", ".join(f"{prior.parameters_per_class:,} parameters to {prior.stage}" for prior in trainings[1:])
        print(f"classes: unknown and not counted, because the images are missing; each class adds {added}")
    else:
        print(f"classes: {classes}" if classes else "classes: none, because the images have no labels")
    size = settings.dataset.image_size
    print(
        f"codes: {code_bytes:,.0f} bytes per image of {size} x {size}, 1/{3 * size * size / code_bytes:.0f} of the "
        "bytes of its pixels"
    )
    return 0


def count_classes(dataset: DatasetConfig) -> int | None:
    """Count the classes by the names in the source; None if the source cannot be read."""
    if dataset.labels == "none":
        return 0
    try:
        return len(classes_of(dataset))
    except UserError:
        return None


def count(settings: Params, classes: int) -> Iterator[Training]:
    """Yield the cost of the VQ-VAE and then of each prior, for labels of `classes` classes; 0 for no labels."""
    size = settings.dataset.image_size
    with torch.device("meta"):
        vqvae, image = VQVAE(settings.vqvae), torch.empty(1, 3, size, size)
    flops = cost.forward_flops(partial(vqvae, image))
    yield _training("vqvae", cost.count_parameters(vqvae), 0, flops, settings.train_vqvae)

    coarser: dict[str, Grid] = {}
    coarser_codes: dict[str, torch.Tensor] = {}
    for level, side in settings.vqvae.grids(size).items():
        entries, prior = settings.vqvae.levels[level].entries, settings.priors[level]
        build_for = partial(build, prior.network, entries=entries, grid=(side, side), coarser=coarser)
        with torch.device("meta"):
            network, larger = build_for(classes=classes), build_for(classes=classes + 1)
            codes, labels = torch.zeros(1, side, side, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        flops = cost.forward_flops(partial(network, codes, coarser_codes, labels if classes else None))
        parameters, per_class = (
            cost.count_parameters(network),
            cost.count_parameters(larger) - cost.count_parameters(network),
        )
        yield _training(f"prior_{level}", parameters, per_class, flops, prior.train)
        coarser[level], coarser_codes[level] = Grid(entries, side, side), codes


def bytes_per_image(settings: Params) -> float:
    """Compute the bytes of an image's codes: log2(K) bits per code, as if all K entries were equally likely."""
    grids = settings.vqvae.grids(settings.dataset.image_size)
    return sum(side**2 * math.log2(settings.vqvae.levels[level].entries) for level, side in grids.items()) / 8


def _training(stage: str, parameters: int, per_class: int, flops: int, train: TrainConfig) -> Training:
    copies = 4 if train.ema_decay else 3  # of each parameter in a checkpoint
    training_flops = 3 * flops * train.batch_size * train.steps
    return Training(stage, parameters, per_class, flops, training_flops, 4 * copies * parameters)
