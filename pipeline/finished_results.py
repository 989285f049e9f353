"""Finished results: a stage that would compute what it has computed before takes the earlier result instead.

    runs/STAGE/FINGERPRINT/result/         metrics and plots of the finished stage; its manifest has the MD5 of the
                                           manifest of the stage's artifact
    runs/STAGE/FINGERPRINT/dvc-cache-md5   the MD5 under which DVC's cache lists the files of the artifact

The artifact itself stays in DVC's cache. DVC restores a result whose command, dependencies and settings are all as
recorded; this module also restores it when a new release has changed dvc.yaml, or has added a setting.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from pipeline import dvc_yaml
from pipeline.result_versions import locked
from stages.errors import UserError
from stages.formats import artifact

RESULT = "result"
CACHE_MD5 = "dvc-cache-md5"


def record(stage: dvc_yaml.Stage, work: Path) -> None:
    """Record a finished result in the stage's work folder."""
    meta = {"manifest_md5": _md5(Path(stage.outs[0], artifact.MANIFEST))}
    with artifact.commit_folder(work / RESULT, RESULT, meta) as folder:
        for path in map(Path, (*stage.metrics, *stage.plots)):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                shutil.copytree(path, folder / path)
            elif path.is_file():
                shutil.copyfile(path, folder / path)


def restore(stage: dvc_yaml.Stage, work: Path, cache: Path) -> bool:
    """Put the finished result of a work folder back in place; return False if it is not there or not intact.

    `cache` is the folder of DVC's cache. Every file is verified before anything in place is replaced.
    """
    index_cache([stage], work.parents[1], cache)
    out = Path(stage.outs[0])
    try:
        result = artifact.read(work / RESULT, RESULT)
        result.verify()
        if not _is_intact(out, result.meta["manifest_md5"]):
            _copy_from_cache(out, result.meta["manifest_md5"], (work / CACHE_MD5).read_text(encoding="utf-8"), cache)
    except (OSError, ValueError, UserError):
        return False
    for name in result.files:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(result.path(name), name)
    return True


def index_cache(stages: Iterable[dvc_yaml.Stage], runs: Path, cache: Path) -> None:
    """Note for each recorded result where DVC's cache lists its files.

    dvc.lock names only the newest result of a stage. With these notes earlier ones can be found, too.
    """
    for stage in stages:
        md5 = next((out["md5"] for out in locked(stage).get("outs", []) if out.get("path") == stage.outs[0]), "")
        try:
            manifest_md5 = _listing(cache, md5)[artifact.MANIFEST]
        except (OSError, ValueError, KeyError):  # nothing is cached, or the cache is damaged
            continue
        for manifest in (runs / stage.cli_name).glob(f"*/{RESULT}/{artifact.MANIFEST}"):
            recorded = json.loads(manifest.read_bytes())["meta"]["manifest_md5"]
            note = manifest.parents[1] / CACHE_MD5
            if recorded == manifest_md5 and not note.exists():
                with artifact.atomic_write(note) as temporary:
                    temporary.write_text(md5, encoding="utf-8")


def _copy_from_cache(out: Path, manifest_md5: str, md5: str, cache: Path) -> None:
    """Copy a folder from DVC's cache and verify it; raises OSError, ValueError or UserError if it is not intact."""
    temporary = out.with_name(f".{out.name}.restoring")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        for name, file_md5 in _listing(cache, md5).items():
            target = temporary / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(_cached(cache, file_md5), target)
        if not _is_intact(temporary, manifest_md5):
            raise ValueError(f"{md5} in {cache} is damaged")
        shutil.rmtree(out, ignore_errors=True)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_intact(folder: Path, manifest_md5: str) -> bool:
    manifest = folder / artifact.MANIFEST
    if not manifest.is_file() or _md5(manifest) != manifest_md5:
        return False
    artifact.read(folder, json.loads(manifest.read_bytes())["kind"]).verify()
    return True


def _listing(cache: Path, md5: str) -> dict[str, str]:
    """Read a folder listing of DVC's cache: relative path -> MD5."""
    listing = {entry["relpath"]: entry["md5"] for entry in json.loads(_cached(cache, md5).read_bytes())}
    if outside := [name for name in listing if name.startswith("/") or ".." in name.split("/")]:
        raise ValueError(f"{outside[0]} leads out of the folder")
    return listing


def _cached(cache: Path, md5: str) -> Path:
    return cache / "files" / "md5" / md5[:2] / md5[2:]


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
