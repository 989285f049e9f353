"""Checks before a run: missing images, GPUs and classes are refused before anything starts."""

import ctypes
import os
import shlex
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from pipeline import composed_from, dvc_yaml, params
from pipeline.text import first_few
from stages.config import ClusterConfig, DatasetConfig, Params
from stages.errors import UserError
from stages.formats import artifact
from stages.images import listing
from stages.runtime import fault_injection

SHARDS = Path("artifacts/shards")
CLASSES_SHOWN = 20  # in an error


def check(settings: Params, will_run: Collection[str], where: str, *, pull: bool = False) -> None:
    """Raise UserError if a run cannot succeed on this machine.

    `will_run` names stages as DVC does; `where` describes the source of the settings. With `pull`, results may come
    from the DVC remote, so neither images nor GPUs are required.
    """
    fault_injection.requested_faults([stage.cli_name for stage in dvc_yaml.stages(params.read()).values()])
    if "shard" in will_run and not pull:
        check_images(settings.dataset)
    if not pull:
        check_gpus(settings.cluster, where)
    if "sample" in will_run and not (pull and "shard" in will_run):
        check_classes(settings, where, from_source="shard" in will_run)


def check_images(dataset: DatasetConfig) -> None:
    """Raise UserError if the source of images does not exist or has no images."""
    listing.check_source(Path(dataset.source), dataset.labels)


def check_gpus(cluster: ClusterConfig, where: object, environment: Mapping[str, str] = os.environ) -> None:
    """Raise UserError if this machine has fewer GPUs than its private cluster would need."""
    required, available = cluster.gpus_per_worker * cluster.workers, gpu_count()
    if required <= available or environment.get("RAY_ADDRESS"):
        return
    overrides = [override for override in _repeating_overrides() if not override.startswith("cluster")]
    options = " ".join(f"-S {shlex.quote(override)}" for override in (*overrides, "cluster=local"))
    raise UserError(
        f"cluster requires {required:g} GPU{'s' * (required != 1)}, and this machine has {available}.",
        where=f"{where}: cluster.gpus_per_worker",
        fix=f"Use {options}, or set RAY_ADDRESS to a Ray cluster with GPUs.",
        code=3,
    )


def _repeating_overrides() -> Sequence[str]:
    """Return the overrides that compose params.yaml; only the recorded ones if conf/ does not compose."""
    with suppress(ImportError, UserError):  # `doctor` runs without Hydra
        from pipeline.drift import repeating_overrides

        return repeating_overrides(params.read())
    return composed_from.read_overrides()


def check_classes(settings: Params, where: str, *, from_source: bool) -> None:
    """Raise UserError if sample.classes names a class that the images do not have.

    `from_source` reads the classes from the names of the source, else from the shards, which may not be here yet.
    """
    if not settings.sample.classes:
        return
    if from_source:
        classes = classes_of(settings.dataset)
    elif SHARDS.is_dir():
        classes = artifact.read(SHARDS, "shards", "shard").meta["classes"]
    else:
        return
    unknown = [name for name in settings.sample.classes if name not in classes]
    if unknown:
        raise UserError(
            f"{unknown[0]!r} is not a class of the images." if classes else "The images have no classes.",
            where=f"{where}: sample.classes",
            fix=f"Use any of: {first_few(classes, CLASSES_SHOWN)}" if classes else "Leave sample.classes empty.",
            code=2,
        )


def classes_of(dataset: DatasetConfig) -> Sequence[str]:
    """List the classes of a data set by the names in its source. Raises UserError if the source cannot be read."""
    images = listing.list_images(Path(dataset.source), dataset.labels, validation_fraction=dataset.validation_fraction)
    return images.classes


def gpu_count() -> int:
    """Count the CUDA devices through the driver: importing torch takes seconds."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    return count.value if cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0
