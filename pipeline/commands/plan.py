"""`vqvae2 plan`: parameters, FLOPs and bytes of a run, the preset that fits the images, and the time of each stage.

Parameters and FLOPs are counted on the meta device, without computing. With GPUs, memory is counted too. Times are
measured on request (pipeline/measure.py).

A level has a grid of side x side codes; side**2 codes per image.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from models import cost
from models.priors import Grid, build
from models.vqvae import VQVAE
from pipeline import params, presets, training_memory
from pipeline.checks.machine import gpu_count
from pipeline.code_rate import fixed_bits
from pipeline.compose import compose_settings
from pipeline.composed_from import describe_source
from pipeline.measure import measure as measure_stages
from pipeline.measure import measured_stages
from pipeline.preflight import check_gpus
from stages.cluster_config import ClusterConfig
from stages.config import DatasetConfig, Params, TrainConfig
from stages.errors import UserError
from stages.formats.model_file import build_classifier
from stages.images.listing import Listing, list_images
from stages.images.overview import count_splits
from stages.tracking.quantities import format_duration, format_number

PASSES_PER_STEP = 3  # a backward pass costs two forward passes
STAGE_WIDTH = 14  # characters of the column with the names of stages, at least


@dataclass(frozen=True)
class Training:
    """Cost of training one network."""

    stage: str
    parameters: int
    parameters_per_class: int  # additional parameters for each class of a labeled dataset
    forward_flops: int  # floating-point operations of a forward pass, per image
    training_flops: int  # of the whole training
    checkpoint_bytes: (
        int  # float32 weights, their EMA if used, and Adam's two moments of those trained; an upper bound for Muon
    )


def show(overrides: Sequence[str], *, as_json: bool, measure: bool = False) -> int:
    """Print the cost of composed settings, or of params.yaml without overrides; return the exit status.

    `measure` also runs a few training steps and prints the time of each stage.
    """
    data, settings = compose_settings(overrides) if overrides else (params.read(), params.load())
    if measure:
        check_gpus(
            settings.cluster, measured_stages(settings), describe_source(overrides) if overrides else params.FILE
        )
    listing = read_listing(settings.dataset)
    classes = len(listing.classes) if listing is not None else None  # None: unknown, because the images are missing
    if settings.dataset.labels == "none":
        classes = 0
    num_classes = classes or 0
    trainings = list(count(settings, num_classes))
    images = count_splits(listing) if listing is not None else None
    num_train_images = images["train"] if images is not None else None
    advice = presets.try_advise(data, settings, gpus=gpu_count(), num_train_images=num_train_images)
    uses_gpus = any(settings.cluster.for_stage(training.stage).gpus_per_worker for training in trainings)
    memories = training_memory.count_all(settings, num_classes) if uses_gpus else None
    seconds = measure_stages(settings, listing, num_classes) if measure else None
    if as_json:
        result = {
            "classes": classes,
            "trainings": [asdict(training) for training in trainings],
            "code_bytes_per_image": fixed_bits(settings) / 8,
            "images": images,
            "experiment": advice.fit.experiment if advice else None,
            "fits": advice.fit.fits if advice else None,
            "recommended": advice.command if advice else None,
        }
        if memories is not None:
            result["memory"] = [memory.to_json() for memory in memories]
        print(json.dumps(result | ({"seconds": seconds} if seconds is not None else {}), indent=1))
        return 0
    print("\n".join(_cost_lines(settings, trainings, classes)))
    if memories is not None:
        # Counted while it is printed: a large network takes seconds.
        for line in training_memory.lines(memories, _name_width(trainings)):
            print(line, flush=True)
    if advice is not None:
        print("\n".join(advice.lines()))
    if seconds is not None:
        print("\n".join(_time_lines(settings, seconds)))
    return 0


def _name_width(trainings: Sequence[Training]) -> int:
    """Return the width of the column with the names of stages."""
    return max(STAGE_WIDTH, *(len(training.stage) + 1 for training in trainings))


def _cost_lines(settings: Params, trainings: Sequence[Training], classes: int | None) -> Iterator[str]:
    width = _name_width(trainings)
    yield f"{'stage':<{width}}{'parameters':>13}{'GFLOP/image':>13}{'training TFLOP':>16}{'checkpoint MB':>15}"
    for training in trainings:
        yield (
            f"{training.stage:<{width}}{training.parameters:>13,}{format_number(training.forward_flops / 1e9, 3):>13}"
            f"{format_number(training.training_flops / 1e12, 3):>16}{training.checkpoint_bytes / 1e6:>15,.1f}"
        )
    if classes is None:
        added = ", ".join(
            f"{training.parameters_per_class:,} parameters to {training.stage}"
            for training in trainings
            if training.parameters_per_class
        )
        yield f"classes: unknown and not counted, because the images are missing; each class adds {added}"
    else:
        yield f"classes: {classes}" if classes else "classes: none, because the images have no labels"
    size, code_bytes = settings.dataset.image_size, fixed_bits(settings) / 8
    yield (
        f"codes: {code_bytes:,.0f} bytes per image of {size} x {size}, 1/{3 * size * size / code_bytes:.0f} of the "
        "bytes of its pixels"
    )


def _time_lines(settings: Params, seconds: Mapping[str, float]) -> Iterator[str]:
    usual = _describe_workers(settings.cluster)
    yield f"time, measured on this machine for {usual}:"
    for stage, time in seconds.items():
        workers = _describe_workers(settings.cluster.for_stage(stage))
        yield f"{stage:<{STAGE_WIDTH}}{format_duration(time):>13}{f'  for {workers}' if workers != usual else ''}"
    yield f"{'together':<{STAGE_WIDTH}}{format_duration(sum(seconds.values())):>13}"
    names = [
        "evaluate",
        *(["classifier"] if settings.classifiers else []),
        *(["reject"] if settings.rejections else []),
    ]
    yield f"Not included: {', '.join(names)}, and the start of each stage, about 10 seconds."
    load, num_processors = os.getloadavg()[0], os.cpu_count() or 1
    if load > num_processors + 1:
        busy = f"load {load:.0f} on {num_processors} processors"
        yield f"Other programs use this machine ({busy}), so these times are too long."


def _describe_workers(cluster: ClusterConfig) -> str:
    """Describe the workers of a stage, such as `8 x 1 GPU`; of a range, the fewest."""
    gpus, cpus = cluster.gpus_per_worker, cluster.cpus_per_worker
    return f"{cluster.min_workers} x " + (f"{gpus:g} GPU" if gpus else f"{cpus:g} CPU")


def read_listing(dataset: DatasetConfig) -> Listing | None:
    """List the images by the names in the source; None if the source cannot be read."""
    try:
        return list_images(Path(dataset.source), dataset.labels, validation_fraction=dataset.validation_fraction)
    except UserError:
        return None


def count(settings: Params, classes: int) -> Iterator[Training]:
    """Yield the cost of the VQ-VAE, each prior and each classifier. `classes` is 0 for images without labels."""
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
        parameters, per_class = _parameters(network, larger)
        yield _training(f"prior_{level}", parameters, per_class, flops, prior.train)
        coarser[level], coarser_codes[level] = Grid(entries, side, side), codes

    for name, classifier in settings.classifiers.items():
        least = max(classes, 1)  # a layer without outputs cannot be initialized
        with torch.device("meta"):
            classifiers = [build_classifier(classifier.network, number) for number in (least, least + 1)]
        parameters, per_class = _parameters(*classifiers)
        parameters -= (least - classes) * per_class
        flops = cost.forward_flops(partial(classifiers[0], image))
        frozen = cost.count_frozen(classifiers[0])
        yield _training(f"classifier_{name}", parameters, per_class, flops, classifier.train, frozen)


def _parameters(network: nn.Module, larger: nn.Module) -> tuple[int, int]:
    """Return a network's number of parameters, and how many more `larger` has: the same network with one more class."""
    parameters = cost.count_parameters(network)
    return parameters, cost.count_parameters(larger) - parameters


def _training(stage: str, parameters: int, per_class: int, flops: int, train: TrainConfig, frozen: int = 0) -> Training:
    copies = 2 if train.ema_decay else 1  # of each weight in a checkpoint: itself and its EMA
    moments = 2 * (parameters - frozen)
    passes = 1 if frozen else PASSES_PER_STEP  # no gradient passes a frozen trunk
    training_flops = passes * flops * train.batch_size * train.steps
    return Training(stage, parameters, per_class, flops, training_flops, 4 * (copies * parameters + moments))
