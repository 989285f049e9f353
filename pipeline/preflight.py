"""Preflight checks: refuse a run that cannot succeed, in seconds, before anything starts.

`vqvae2 doctor` and every run make the same checks. `vqvae2 versions --write`, the first stage of a plain `dvc repro`,
makes those of QUICK_CHECKS.
"""

import os
import shlex
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from pipeline import composed_from, dvc_yaml, params, shared_cluster
from pipeline.checks import inputs, machine, project_folder, servers, training
from pipeline.checks.check import Answer, EnvironmentCheck, Request, SettingsCheck
from stages.cluster_config import ClusterConfig
from stages.config import DatasetConfig, Params
from stages.errors import UserError, unknown_class
from stages.formats import artifact
from stages.images import listing
from stages.runtime import fault_injection
from stages.tracking.journal import redact_secrets

SHARDS = Path("artifacts/shards")


def check(settings: Params, will_run: Collection[str], where: str, *, pull: bool = False) -> None:
    """Raise UserError if a run cannot succeed on this machine, and print what may prevent it.

    `will_run` names stages as DVC does; `where` describes the source of the settings. With `pull`, results may come
    from the DVC remote, so neither images nor GPUs are required.
    """
    fault_injection.requested_faults([stage.cli_name for stage in dvc_yaml.stages(params.read()).values()])
    request = Request(settings, where, will_run, pull)
    answers = [(name, ask(request)) for name, ask in SETTINGS_CHECKS.items()]
    answers += [(name, ask(request.environment)) for name, ask in (MACHINE_CHECKS | PROJECT_CHECKS).items()]
    for name, answer in answers:
        if answer.fix:
            text = answer.text.removesuffix(".")
            print(redact_secrets(f"note: {name}: {text}. {answer.fix}"), file=sys.stderr)


def check_quickly(environment: Mapping[str, str] = os.environ) -> None:
    """Raise UserError if no stage can succeed here. Does nothing inside of `vqvae2 run`, which has checked more."""
    if shared_cluster.FOLDER not in environment:
        for ask in QUICK_CHECKS:
            ask(environment)


def check_resources(request: Request) -> Answer:
    """Check the GPUs of this machine and the classes of the samples."""
    if not request.pull:
        check_gpus(request.settings.cluster, request.stages, request.where, request.environment)
    writes_shards = "shard" in request.stages
    if "sample" in request.stages and not (request.pull and writes_shards):
        check_classes(request.settings, request.where, from_source=writes_shards)
    return Answer(f"{request.where} is valid and fits this machine")


def check_gpus(
    cluster: ClusterConfig, stages: Iterable[str], where: object, environment: Mapping[str, str] = os.environ
) -> None:
    """Raise UserError if this machine has fewer GPUs than its private cluster would need for any of the stages."""
    configs = {stage: cluster.for_stage(stage) for stage in map(dvc_yaml.cli_name, stages)}
    gpus = {stage: config.gpus_per_worker * config.min_workers for stage, config in configs.items()}
    stage = max(gpus, key=gpus.__getitem__, default="")
    required, available = gpus.get(stage, 0), machine.gpu_count()
    if required <= available or environment.get("RAY_ADDRESS"):
        return
    user = f" for {stage}" if cluster.stages else ""  # otherwise all stages need the same
    overrides = [
        override for override in _repeating_overrides() if composed_from.key_of(override).partition(".")[0] != "cluster"
    ]
    options = " ".join(f"-S {shlex.quote(override)}" for override in (*overrides, "cluster=local"))
    raise UserError(
        f"cluster requires {required:g} GPU{'s' * (required != 1)}{user}, and this machine has {available}.",
        where=f"{where}: cluster.gpus_per_worker",
        fix=f"Use {options}, or set RAY_ADDRESS to a Ray cluster with GPUs.",
        code=3,
    )


def _repeating_overrides() -> Sequence[str]:
    """Return the overrides that compose params.yaml; only the recorded ones if conf/ does not compose."""
    with suppress(ImportError, UserError):  # `doctor` runs without Hydra
        from pipeline.params_drift import repeating_overrides

        return repeating_overrides(params.read())
    return composed_from.read_overrides()


def check_classes(settings: Params, where: str, *, from_source: bool) -> None:
    """Raise UserError if sample.classes names a class that the images do not have.

    With `from_source`, the classes are those of the names in the source; otherwise those of the shards, if these exist.
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
        raise unknown_class(unknown[0], classes, where=f"{where}: sample.classes")


def classes_of(dataset: DatasetConfig) -> Sequence[str]:
    """List the classes of a dataset by the names in its source. Raises UserError if the source cannot be read."""
    images = listing.list_images(Path(dataset.source), dataset.labels, validation_fraction=dataset.validation_fraction)
    return images.classes


MACHINE_CHECKS: dict[str, EnvironmentCheck] = {
    "python": machine.check_python,
    "packages": machine.check_packages,
    "torchvision": machine.check_torchvision,
    "processors": machine.check_processors,
    "memory": machine.check_memory,
    "shared memory": machine.check_shared_memory,
}
PROJECT_CHECKS: dict[str, EnvironmentCheck] = {
    "folder": project_folder.check_folder,
    "permissions": project_folder.check_permissions,
    "disk": project_folder.check_disk,
    "ray": servers.check_ray,
    "mlflow": servers.check_mlflow,
}
SETTINGS_CHECKS: dict[str, SettingsCheck] = {
    "images": inputs.check_images,
    "resources": check_resources,
    "training": training.check_moving_averages,
    "late inputs": inputs.check_late_inputs,
    "sockets": servers.check_loader_sockets,
    "storage": servers.check_storage,
}
QUICK_CHECKS = (
    project_folder.check_folder,
    project_folder.check_permissions,
    project_folder.check_disk,
    servers.check_ray,
)
