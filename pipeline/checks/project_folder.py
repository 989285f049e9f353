"""Checks of the project's folder: its name, its code, permissions, disk space, Git and DVC."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import models
import stages
from pipeline import dvc, dvc_yaml, params, process
from pipeline.checks.check import Answer
from pipeline.checks.machine import GIB
from pipeline.conf_layers import PACKAGE_ROOT
from pipeline.text import first_few
from stages.errors import UserError

WARN_DISK_BYTES = 5 * GIB  # artifacts, DVC's cache and checkpoints of a small experiment
MIN_DISK_BYTES = GIB // 4  # less than the smallest run writes
# Packages that Ray's workers import, with the current folder first.
PACKAGES = tuple(dict.fromkeys(package.__name__.partition(".")[0] for package in (stages, models)))
CODE = Path(__file__).parents[__name__.count(".")]
# Folders and files that a run writes, besides those of dvc.yaml.
WRITTEN = (".", "runs", ".dvc", ".dvc/tmp", ".dvc/cache", "mlruns", params.FILE, dvc_yaml.LOCK, "mlflow.db")


def check_folder(environment: Mapping[str, str]) -> Answer:
    """Check that the current folder is a project whose name and code can be used."""
    process.require_project()
    folder = Path.cwd()
    try:
        os.fsencode(folder).decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(
            "The path of the project must be UTF-8, because it is recorded in files.",
            where=ascii(str(folder)),
            fix="Rename the folder.",
            code=2,
        ) from None
    if set("{}") & set(str(folder)):
        raise UserError(
            "The path of the project must have neither { nor }, which DVC takes for a template.",
            where=folder,
            fix="Rename the folder.",
            code=2,
        )
    require_own_packages(folder)
    return Answer(str(folder))


def require_own_packages(folder: Path, code: Path = CODE, names: Sequence[str] = PACKAGES) -> None:
    """Raise UserError if a folder has packages of another project with our names, which Ray's workers would import.

    `code` is the folder of the packages in use: stages and models, or vqvae2 of the wheel.
    """
    for name in names:
        package, module = folder / name, folder / f"{name}.py"
        if (package / "__init__.py").is_file() and not package.samefile(code / name):
            raise UserError(
                f"The folder {name}/ is a Python package of another project, and workers would import it.",
                where=package,
                fix="Rename it, or remove its __init__.py.",
                code=2,
            )
        if module.is_file() and not process.is_copy_of_project(folder):
            raise UserError(
                f"The file {name}.py is a Python module of another project, and workers would import it.",
                where=module,
                fix="Rename it.",
                code=2,
            )


def check_permissions(environment: Mapping[str, str]) -> Answer:
    """Check that this user may write every folder and file that a run writes."""
    for path in _written_paths():
        rights = os.W_OK | os.X_OK if path.is_dir() else os.W_OK
        if path.exists() and not os.access(path, rights):
            subject = "This folder is" if path == Path() else f"{path} is"
            raise UserError(
                f"{subject} not writable.",
                where=path.absolute(),
                fix="Fix its permissions, or work in a copy of the project.",
                code=3,
            )
    return Answer("this folder is writable")


def _written_paths() -> Iterator[Path]:
    yield from (Path(name) for name in WRITTEN)
    for pattern in (
        "artifacts",
        "artifacts/*",
        "artifacts/priors/*",
        "artifacts/classifiers/*",
        "metrics",
        "plots",
        "plots/*",
    ):
        yield from sorted(Path().glob(pattern))


def check_disk(environment: Mapping[str, str]) -> Answer:
    """Check the free space of the disks that a run writes to: the folders may be links to other disks."""
    folders = [path for path in (Path(name) for name in (".", "artifacts", "runs", ".dvc/cache")) if path.is_dir()]
    free, folder = min((shutil.disk_usage(folder).free, folder) for folder in folders)
    return judge_disk(free, folder)


def judge_disk(free_bytes: int, folder: Path = Path()) -> Answer:
    """Judge the free space of a folder."""
    place = "this folder" if folder == Path() else str(folder)
    if free_bytes < MIN_DISK_BYTES:
        raise UserError(
            f"The disk is full: {free_bytes / GIB:.2g} GiB free in {place}.",
            where=folder.absolute(),
            fix="Free some space, such as by: dvc gc --workspace",
            code=3,
        )
    text = f"{free_bytes / GIB:.1f} GiB free in {place}"
    return Answer(text, "" if free_bytes >= WARN_DISK_BYTES else "Free some space.")


def check_pipeline(environment: Mapping[str, str]) -> Answer:
    """Check that dvc.yaml has the stages and plots of this package: `vqvae2 init` copied those of its version."""
    packaged = PACKAGE_ROOT / dvc_yaml.FILE
    if differing := dvc_yaml.differences(params.read(dvc_yaml.FILE), params.read(packaged)):
        return Answer(
            f"{dvc_yaml.FILE} differs from that of the installed vqvae2: {first_few(differing)}",
            f"Take these over from {packaged}. Stages of your own, and `frozen`, may stay.",
        )
    return Answer(f"{dvc_yaml.FILE} has the stages of the installed vqvae2")


def check_dvc(environment: Mapping[str, str]) -> Answer:
    """Check that DVC can compute its status: a repository, no lock of another process, valid files."""
    dvc.require_status()
    return Answer("DVC can compute its status")
