"""`vqvae2 doctor`: checks of the machine, the project and the configured servers, with a fix for each problem."""

import importlib.metadata
import json
import os
import platform
import shutil
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from pipeline import params, preflight, process
from pipeline.commands import ui
from stages.errors import UserError

GIB = 2**30
MIN_MEMORY_BYTES = 2 * GIB  # Ray alone takes about half a GiB
MIN_SHARED_MEMORY_BYTES = GIB // 2  # Docker's default of 64 MiB is too little for Ray's object store
MIN_DISK_BYTES = 5 * GIB  # artifacts, DVC's cache and checkpoints of a small experiment
CONNECT_TIMEOUT_S = 3
PACKAGES = ("vqvae2", "torch", "ray", "mlflow", "dvc", "hydra-core", "webdataset", "pyarrow", "typer", "torchmetrics")


@dataclass(frozen=True)
class CheckResult:
    """Result of one check."""

    name: str
    state: str  # "ok", "warning" or "error"
    text: str
    fix: str = ""


def show(*, as_json: bool) -> int:
    """Run all checks and print their results; return the exit status, 3 if a check failed."""
    results = run_checks()
    if as_json:
        print(json.dumps([asdict(result) for result in results], indent=1))
    else:
        for result in results:
            print(f"{result.state:<8} {result.name:<14} {result.text}")
            if result.fix:
                print(f"{'':<23} fix: {result.fix}")
    return 3 if any(result.state == "error" for result in results) else 0


def run_checks() -> list[CheckResult]:
    """Run the checks of the machine, then those of the project, which import the required packages."""
    machine: Sequence[Callable[[], CheckResult]] = (
        check_python, check_packages, check_torchvision, check_processors, check_memory, check_shared_memory,
    )  # fmt: skip
    project: Sequence[Callable[[], CheckResult]] = (check_disk, check_settings, check_images, check_ray, check_mlflow)
    results = [check() for check in machine]
    if all(result.state != "error" for result in results):
        results += [check() for check in project]
    return results


def check_python() -> CheckResult:
    return CheckResult("python", "ok", f"{platform.python_version()} at {sys.executable}")


def installed_version(package: str) -> str | None:
    """Return the version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_packages() -> CheckResult:
    return judge_packages({name: installed_version(name) for name in PACKAGES})


def judge_packages(versions: Mapping[str, str | None]) -> CheckResult:
    """Judge the versions of the required packages; None for a missing one."""
    if missing := [name for name, version in versions.items() if version is None]:
        fix = "pip install -c constraints.txt -e ."
        return CheckResult("packages", "error", f"missing: {', '.join(missing)}", fix)
    return CheckResult("packages", "ok", ", ".join(f"{name} {version}" for name, version in versions.items()))


def check_torchvision() -> CheckResult:
    return judge_torchvision(installed_version("torchvision"))


def judge_torchvision(version: str | None) -> CheckResult:
    """Judge an installed torchvision: each release requires one exact version of torch."""
    if version is None:
        return CheckResult("torchvision", "ok", "not installed, not required")
    text = f"{version} is installed and requires one exact version of torch"
    return CheckResult("torchvision", "warning", text, "pip uninstall torchvision")


def check_processors() -> CheckResult:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return CheckResult("processors", "ok", f"{available} CPU cores, {preflight.gpu_count()} GPUs")


def check_memory() -> CheckResult:
    memory = psutil.virtual_memory()
    return judge_memory(memory.available, memory.total)


def judge_memory(available_bytes: int, total_bytes: int) -> CheckResult:
    text = f"{available_bytes / GIB:.1f} of {total_bytes / GIB:.1f} GiB available"
    if available_bytes < MIN_MEMORY_BYTES:
        return CheckResult("memory", "warning", text, "Close other programs: Ray alone takes about half a GiB.")
    return CheckResult("memory", "ok", text)


def check_shared_memory() -> CheckResult:
    path = Path("/dev/shm")
    if not path.is_dir():
        return CheckResult("shared memory", "ok", "no /dev/shm; Ray uses files")
    return judge_shared_memory(shutil.disk_usage(path).total)


def judge_shared_memory(total_bytes: int) -> CheckResult:
    if total_bytes < MIN_SHARED_MEMORY_BYTES:
        text = f"/dev/shm has {total_bytes / GIB:.2f} GiB"
        return CheckResult("shared memory", "warning", text, "In Docker: docker run --shm-size=2g")
    return CheckResult("shared memory", "ok", f"/dev/shm has {total_bytes / GIB:.1f} GiB")


def check_disk() -> CheckResult:
    folder = Path.cwd()
    return judge_disk(shutil.disk_usage(folder).free, writable=os.access(folder, os.W_OK))


def judge_disk(free_bytes: int, *, writable: bool) -> CheckResult:
    if not writable:
        return CheckResult(
            "disk", "error", "this folder is not writable", "Work in a copy of it, or fix its permissions."
        )
    text = f"{free_bytes / GIB:.1f} GiB free in this folder"
    if free_bytes < MIN_DISK_BYTES:
        return CheckResult("disk", "warning", text, "Free some space.")
    return CheckResult("disk", "ok", text)


def check_settings() -> CheckResult:
    """Check that params.yaml is valid, fits this machine and is what conf/ composes to."""
    try:
        process.require_project()
        preflight.check_gpus(params.load().cluster, params.FILE)
    except UserError as error:
        return CheckResult("settings", "error", f"{error.what} ({error.where})", error.fix)
    from pipeline.drift import drift  # imports Hydra, which may be missing: check_packages reports that

    difference, fix = drift()
    if difference:
        return CheckResult("settings", "warning", difference, fix)
    return CheckResult("settings", "ok", f"{params.FILE} is valid")


def check_images() -> CheckResult:
    """Check that the source of images exists and has images."""
    try:
        process.require_project()
        dataset = params.load().dataset
        preflight.check_images(dataset)
    except UserError as error:
        return CheckResult("images", "error", f"{error.what} ({error.where})", error.fix)
    return CheckResult("images", "ok", dataset.source)


def check_ray(environment: Mapping[str, str] = os.environ) -> CheckResult:
    """Check that the cluster at RAY_ADDRESS accepts connections and requires a token."""
    address = environment.get("RAY_ADDRESS", "")
    if not address:
        return CheckResult("ray", "ok", "no RAY_ADDRESS: each run starts a private cluster")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if port.isdecimal():  # else a name that Ray resolves, such as "auto"
            socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        return CheckResult(
            "ray", "error", f"RAY_ADDRESS={address}: {error}", "Start the cluster, or unset RAY_ADDRESS."
        )
    if not (environment.get("RAY_AUTH_TOKEN") or environment.get("RAY_AUTH_TOKEN_PATH")):
        return CheckResult(
            "ray",
            "warning",
            f"RAY_ADDRESS={address}, but no token is set",
            "Start the cluster with RAY_AUTH_MODE=token: without it, anyone who reaches its port can run code there.",
        )
    return CheckResult("ray", "ok", f"{address} answers" if port.isdecimal() else f"RAY_ADDRESS={address}")


def check_mlflow(environment: Mapping[str, str] = os.environ) -> CheckResult:
    """Check that MLflow supports the tracking URI, and that its server answers."""
    uri = environment.get("MLFLOW_TRACKING_URI", "")
    try:
        ui.require_store(uri)
    except UserError as error:
        return CheckResult("mlflow", "error", f"{error.what} ({error.where})", error.fix)
    if not uri.startswith("http"):
        return CheckResult("mlflow", "ok", "a database file" if uri else "mlflow.db in this folder")
    without_password = uri.rpartition("@")[2]
    try:
        urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=CONNECT_TIMEOUT_S).close()
    except (urllib.error.URLError, OSError, ValueError) as error:
        return CheckResult(
            "mlflow",
            "warning",
            f"{without_password} does not answer: {error}",
            "Runs continue without it. Upload their metrics later: vqvae2 sync-metrics",
        )
    return CheckResult("mlflow", "ok", f"{without_password} answers")
