"""Finished results: a stage restores a result that it has computed before instead of computing it again.

    runs/STAGE/FINGERPRINT/result/         metrics and plots of the finished stage; its manifest has the MD5 of the
                                           manifest of the stage's artifact
    runs/STAGE/FINGERPRINT/dvc-cache-md5   MD5 of the listing of the artifact's files in DVC's cache

The artifact itself stays in DVC's cache. DVC restores a result if command, dependencies and settings all equal those of
its run cache. This module restores it by its fingerprint, so also after a release has changed dvc.yaml or added a
setting.
"""

import hashlib
import json
import shutil
from pathlib import Path

from pipeline import dvc_yaml
from stages.errors import UserError
from stages.formats import artifact

RESULT = "result"
CACHE_MD5 = "dvc-cache-md5"
READ_ERRORS = (OSError, ValueError, LookupError, TypeError, UserError)  # of a missing, damaged or unknown file


def record(stage: dvc_yaml.Stage, work: Path) -> None:
    """Record a finished result in the stage's work folder."""
    meta = {"manifest_md5": md5_of(Path(stage.outs[0], artifact.MANIFEST))}
    with artifact.commit_folder(work / RESULT, RESULT, meta) as folder:
        for path in map(Path, (*stage.metrics, *stage.plots)):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                shutil.copytree(path, folder / path)
            elif path.is_file():
                shutil.copyfile(path, folder / path)


def exists(work: Path) -> bool:
    """Return whether a work folder has a finished result."""
    return (work / RESULT / artifact.MANIFEST).is_file()


def restorable_md5(stage: dvc_yaml.Stage, work: Path, cache: Path) -> str:
    """Return the MD5 of the listing in DVC's cache from which `restore` would copy, "" for none.

    Verifies no contents. May write a file CACHE_MD5.
    """
    _record_cache_listing(stage, work.parent, cache)
    try:
        artifact.read(work / RESULT, RESULT)
        listing_md5 = (work / CACHE_MD5).read_text(encoding="utf-8")
    except READ_ERRORS:
        return ""
    return listing_md5 if is_cached(cache, listing_md5) else ""


def is_cached(cache: Path, md5: str) -> bool:
    """Return whether DVC's cache has a file, or all files of a folder, whose MD5 ends with .dir."""
    try:
        files = read_listing(cache, md5).values() if md5.endswith(".dir") else [md5]
    except READ_ERRORS:
        return False
    return all(cache_path(cache, file_md5).is_file() for file_md5 in files)


def restore(stage: dvc_yaml.Stage, work: Path, cache: Path) -> bool:
    """Restore the finished result of a work folder; return False if it does not exist or is damaged.

    `cache` is the folder of DVC's cache. Every file is verified before anything in place is replaced.
    """
    _record_cache_listing(stage, work.parent, cache)
    out = Path(stage.outs[0])
    try:
        result = artifact.read(work / RESULT, RESULT)
        result.verify()
        manifest_md5 = result.meta["manifest_md5"]
        if not _is_intact(out, manifest_md5):
            _copy_from_cache(out, manifest_md5, (work / CACHE_MD5).read_text(encoding="utf-8"), cache)
    except READ_ERRORS:
        return False
    for name in result.files:  # paths in the project
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(result.path(name), name)
    return True


def restore_locked(stage: dvc_yaml.Stage, stage_folder: Path, cache: Path) -> bool:
    """Restore the result that dvc.lock names, even if its fingerprint is not the current one; return False on failure.

    `stage_folder` has the work folders of the stage.
    """
    _record_cache_listing(stage, stage_folder, cache)
    locked_md5 = _locked_md5(stage)
    return any(
        restore(stage, path.parent, cache)
        for path in stage_folder.glob(f"*/{CACHE_MD5}")
        if path.read_text(encoding="utf-8", errors="replace") == locked_md5
    )


def _record_cache_listing(stage: dvc_yaml.Stage, stage_folder: Path, cache: Path) -> None:
    """Write CACHE_MD5 beside the result that dvc.lock names now.

    dvc.lock names only one result of a stage, and the next run overwrites it. `stage_folder` has the work folders of
    the stage.
    """
    locked_md5 = _locked_md5(stage)
    try:
        manifest_md5 = read_listing(cache, locked_md5)[artifact.MANIFEST]
    except READ_ERRORS:  # not in dvc.lock, or not in the cache
        return
    for result_folder in stage_folder.glob(f"*/{RESULT}"):
        try:
            result_manifest_md5 = artifact.read(result_folder, RESULT).meta["manifest_md5"]
        except READ_ERRORS:
            continue
        md5_file = result_folder.with_name(CACHE_MD5)
        if result_manifest_md5 == manifest_md5 and not md5_file.exists():
            with artifact.atomic_write(md5_file) as temporary:
                temporary.write_text(locked_md5, encoding="utf-8")


def _locked_md5(stage: dvc_yaml.Stage) -> str:
    """Return the MD5 of the artifact's listing in dvc.lock, "" for none."""
    outs = dvc_yaml.read_lock().get(stage.name, {}).get("outs", [])
    return next((out.get("md5", "") for out in outs if out.get("path") == stage.outs[0]), "")


def _copy_from_cache(out: Path, manifest_md5: str, listing_md5: str, cache: Path) -> None:
    """Copy an artifact from DVC's cache. Raises one of READ_ERRORS if it is missing or damaged."""
    temporary = out.with_name(f".{out.name}.restoring")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        for name, file_md5 in read_listing(cache, listing_md5).items():
            target = temporary / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(cache_path(cache, file_md5), target)
        if not _is_intact(temporary, manifest_md5):
            raise ValueError(f"{listing_md5} in {cache} is damaged")
        shutil.rmtree(out, ignore_errors=True)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_intact(folder: Path, manifest_md5: str) -> bool:
    manifest = folder / artifact.MANIFEST
    try:
        if md5_of(manifest) != manifest_md5:
            return False
        artifact.read(folder, json.loads(manifest.read_bytes())["kind"]).verify()
    except READ_ERRORS:
        return False
    return True


def read_listing(cache: Path, md5: str) -> dict[str, str]:
    """Read a folder listing of DVC's cache: relative path -> MD5. Raises one of READ_ERRORS if it is not valid."""
    listing = {entry["relpath"]: entry["md5"] for entry in json.loads(cache_path(cache, md5).read_bytes())}
    if outside := [name for name in listing if name.startswith("/") or ".." in name.split("/")]:
        raise ValueError(f"{outside[0]} leads out of the folder")
    return listing


def cache_path(cache: Path, md5: str) -> Path:
    """Return the path of contents in DVC's cache."""
    return cache / "files" / "md5" / md5[:2] / md5[2:]


def md5_of(path: Path) -> str:
    """Return the MD5 of a file, by which DVC identifies its contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
