"""Checks of this machine: packages, processors and memory."""

import ctypes
import importlib.metadata
import os
import platform
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil

from pipeline.checks.check import Answer
from stages.errors import UserError, install_command

GIB = 2**30
MIN_MEMORY_BYTES = 2 * GIB  # Ray alone takes about half a GiB
MIN_SHARED_MEMORY_BYTES = GIB // 2  # Docker's default of 64 MiB is too little for Ray's object store
PACKAGES = ("vqvae2", "torch", "ray", "mlflow", "dvc", "hydra-core", "webdataset", "pyarrow", "typer", "torchmetrics")


def check_python(environment: Mapping[str, str]) -> Answer:
    """Name the interpreter."""
    return Answer(f"{platform.python_version()} at {sys.executable}")


def installed_version(package: str) -> str | None:
    """Return the version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_packages(environment: Mapping[str, str]) -> Answer:
    """Check that the main required packages are installed."""
    return judge_packages({name: installed_version(name) for name in PACKAGES})


def judge_packages(versions: Mapping[str, str | None]) -> Answer:
    """Judge the versions of the required packages; None for a missing one."""
    if missing := [name for name, version in versions.items() if version is None]:
        raise UserError(
            f"Packages are missing: {', '.join(missing)}.",
            where=sys.executable,
            fix=f"Run: {install_command()}",
            code=3,
        )
    return Answer(", ".join(f"{name} {version}" for name, version in versions.items()))


def check_torchvision(environment: Mapping[str, str]) -> Answer:
    """Check that an installed torchvision fits the installed torch."""
    version = installed_version("torchvision")
    requirements = importlib.metadata.requires("torchvision") or [] if version else []
    return judge_torchvision(version, requirements, installed_version("torch"))


def judge_torchvision(version: str | None, requirements: list[str], torch_version: str | None) -> Answer:
    """Judge a torchvision by its requirements: each release requires one exact version of torch."""
    if version is None:
        return Answer("not installed, not required")
    pins = [match[1] for text in requirements if (match := re.match(r"torch\s*\(?==\s*([\w.]+)", text))]
    if torch_version and torch_version.partition("+")[0] in pins:
        return Answer(f"{version}, for the installed torch")
    required = f"torch {pins[0]}" if pins else "one exact version of torch"
    return Answer(f"{version} is installed and requires {required}", "pip uninstall torchvision")


def check_processors(environment: Mapping[str, str]) -> Answer:
    """Count CPU cores and GPUs."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Answer(f"{available} CPU cores, {gpu_count()} GPUs")


def gpu_count() -> int:
    """Count the CUDA devices through the driver: importing torch takes seconds."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    return count.value if cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


def check_memory(environment: Mapping[str, str]) -> Answer:
    """Check the available memory."""
    memory = psutil.virtual_memory()
    return judge_memory(memory.available, memory.total)


def judge_memory(available_bytes: int, total_bytes: int) -> Answer:
    """Judge the available memory."""
    text = f"{available_bytes / GIB:.1f} of {total_bytes / GIB:.1f} GiB available"
    enough = available_bytes >= MIN_MEMORY_BYTES
    return Answer(text, "" if enough else "Close other programs: Ray alone takes about half a GiB.")


def check_shared_memory(environment: Mapping[str, str]) -> Answer:
    """Check the size of the shared memory, which Ray's object store uses."""
    path = Path("/dev/shm")
    if not path.is_dir():
        return Answer("no /dev/shm; Ray uses files")
    return judge_shared_memory(shutil.disk_usage(path).total)


def judge_shared_memory(total_bytes: int) -> Answer:
    """Judge the size of the shared memory."""
    enough = total_bytes >= MIN_SHARED_MEMORY_BYTES
    return Answer(f"/dev/shm has {total_bytes / GIB:.2g} GiB", "" if enough else "In Docker: docker run --shm-size=2g")
