"""What can be known to fail before anything starts, and what `vqvae2 doctor` looks at."""

import ctypes
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline import dvc_yaml, params, params_header, process
from pipeline.commands import ui
from stages.config import DatasetConfig, Params
from stages.errors import UserError
from stages.runtime import fault_injection

GIB = 2**30
PACKAGES = ("vqvae2", "torch", "ray", "mlflow", "dvc", "hydra-core", "webdataset", "pyarrow", "typer", "torchmetrics")


def check(settings: Params, will_run: Collection[str], where: str, *, pull: bool = False) -> None:
    """Refuse a run that is bound to fail: images, a GPU or a class that is not there.

    `where` says what the settings were made from. A run that may `pull` its results needs neither images nor GPUs.
    """
    fault_injection.asked_for([stage.cli_name for stage in dvc_yaml.stages(params.read()).values()])
    if "shard" in will_run and not pull:
        from stages.images.listing import check_source

        check_source(Path(settings.dataset.source), settings.dataset.labels)
    wanted = settings.cluster.gpus_per_worker * settings.cluster.workers
    if wanted > gpus() and not os.environ.get("RAY_ADDRESS") and not pull:
        here = [*(one for one in params_header.kept() if not one.startswith("cluster")), "cluster=local"]
        raise UserError(
            f"cluster asks for {wanted:g} GPU{'s' * (wanted != 1)}; this machine has {gpus()}.",
            where=f"{where}: cluster.gpus_per_worker",
            fix=f"Use {' '.join(f'-S {shlex.quote(one)}' for one in here)}, or name a Ray cluster that has them in "
            "RAY_ADDRESS.",
            code=3,
        )
    if settings.sample.classes and "sample" in will_run and not (pull and "shard" in will_run):
        classes = _classes(settings.dataset, made="shard" not in will_run)
        unknown = [name for name in settings.sample.classes if classes is not None and name not in classes]
        if unknown:
            raise UserError(
                f"The images have no class {unknown[0]!r}." if classes else "The images have no classes to draw.",
                where=f"{where}: sample.classes",
                fix=f"Use any of: {params_header.first_few(classes, 20)}" if classes else "Leave sample.classes empty.",
                code=2,
            )


def _classes(dataset: DatasetConfig, *, made: bool) -> Sequence[str] | None:
    """Name the classes of the shards if they are made, or else of the source, by its names alone; None: not known."""
    from stages.formats import artifact

    if made:
        shards = Path("artifacts/shards")
        return artifact.read(shards, "shards", "shard").meta["classes"] if shards.is_dir() else None
    return classes_of(dataset)


def classes_of(dataset: DatasetConfig) -> Sequence[str]:
    """Name the classes of a data set by the names in its source alone; refuse a source that cannot be read."""
    from stages.images import listing

    found = listing.find(Path(dataset.source), dataset.labels, validation_fraction=dataset.validation_fraction)
    return found.classes


def gpus() -> int:
    """Count the CUDA devices, without torch."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    return count.value if cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    name: str
    state: str  # "ok", "warning" or "error"
    text: str
    fix: str = ""


def examine() -> list[Finding]:
    """Look at all that a run needs of this machine and this folder."""
    machine: tuple[Callable[[], Finding], ...] = (_python, _packages, _torchvision, _processors, _memory)
    folder: tuple[Callable[[], Finding], ...] = (_shared_memory, _disk, _settings, _source, _ray, _mlflow)
    return [look() for look in (*machine, *folder)]


def as_json(findings: Iterable[Finding]) -> str:
    return json.dumps([asdict(finding) for finding in findings], indent=1)


def _python() -> Finding:
    return Finding("python", "ok", f"{platform.python_version()} at {sys.executable}")


def _packages() -> Finding:
    found, absent = [], []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            absent.append(name)
    if absent:
        return Finding("packages", "error", f"missing: {', '.join(absent)}", "pip install -c constraints.txt -e .")
    return Finding("packages", "ok", ", ".join(found))


def _torchvision() -> Finding:
    try:
        version = importlib.metadata.version("torchvision")
    except importlib.metadata.PackageNotFoundError:
        return Finding("torchvision", "ok", "absent, and not needed")
    return Finding(
        "torchvision", "warning", f"{version} is installed; it ties torch to one release", "pip uninstall torchvision"
    )


def _processors() -> Finding:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Finding("processors", "ok", f"{available} CPU cores, {gpus()} GPUs")


def _memory() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    text = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB available"
    if memory.available < 2 * GIB:
        return Finding("memory", "warning", text, "Close other programs: Ray alone takes about half a GiB.")
    return Finding("memory", "ok", text)


def _shared_memory() -> Finding:
    path = Path("/dev/shm")
    if not path.is_dir():
        return Finding("shared memory", "ok", "no /dev/shm; Ray uses files")
    total = shutil.disk_usage(path).total
    if total < GIB // 2:
        return Finding(
            "shared memory", "warning", f"/dev/shm holds {total / GIB:.2f} GiB", "In Docker: docker run --shm-size=2g"
        )
    return Finding("shared memory", "ok", f"/dev/shm holds {total / GIB:.1f} GiB")


def _disk() -> Finding:
    if not os.access(Path.cwd(), os.W_OK):
        return Finding(
            "disk", "error", "this folder cannot be written", "Work in a copy of it, or mend its permissions."
        )
    free = shutil.disk_usage(Path.cwd()).free
    state = "warning" if free < 5 * GIB else "ok"
    return Finding("disk", state, f"{free / GIB:.1f} GiB free here", "Free some space." if state != "ok" else "")


def _settings() -> Finding:
    try:
        process.require_project()
        params.load()
    except UserError as error:
        return Finding("settings", "error", f"{error.where}: {error.what}", error.fix)
    changed, remedy = params_header.drift()
    if changed:
        return Finding("settings", "warning", changed, remedy)
    return Finding("settings", "ok", f"{params.FILE} is valid")


def _source() -> Finding:
    from stages.images.listing import check_source

    try:
        process.require_project()
        settings = params.load()
        check_source(Path(settings.dataset.source), settings.dataset.labels)
    except UserError as error:
        return Finding("images", "error", f"{error.what} ({error.where})", error.fix)
    return Finding("images", "ok", settings.dataset.source)


def _ray() -> Finding:
    address = os.environ.get("RAY_ADDRESS", "")
    if not address:
        return Finding("ray", "ok", "no RAY_ADDRESS: a private cluster starts with each run")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if port.isdecimal():  # "auto" and the like are Ray's to find
            socket.create_connection((host, int(port)), timeout=3).close()
    except OSError as error:
        return Finding("ray", "error", f"RAY_ADDRESS={address}: {error}", "Start the cluster, or unset RAY_ADDRESS.")
    if not (os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")):
        return Finding(
            "ray", "warning", f"RAY_ADDRESS={address}, but no token is set",
            "Start the cluster with RAY_AUTH_MODE=token: who reaches its port can run code there.",
        )  # fmt: skip
    return Finding("ray", "ok", f"{address} answers" if port.isdecimal() else f"RAY_ADDRESS={address}")


def _mlflow() -> Finding:
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    try:
        ui.require_store(uri)
    except UserError as error:
        return Finding("mlflow", "error", f"{error.what} ({error.where})", error.fix)
    if not uri.startswith("http"):
        return Finding("mlflow", "ok", "a database file" if uri else "mlflow.db in this folder")
    shown = uri.rpartition("@")[2]
    try:
        urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=3).close()
    except (urllib.error.URLError, OSError, ValueError) as error:
        return Finding(
            "mlflow", "warning", f"{shown} does not answer: {error}", "Runs go on; send later: vqvae2 sync-metrics"
        )
    return Finding("mlflow", "ok", f"{shown} answers")
