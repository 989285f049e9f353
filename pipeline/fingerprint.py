"""Fingerprint of a stage: a hash of its settings, its inputs' digests and its code."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline import dvc_yaml
from stages.config import Params
from stages.errors import UserError
from stages.formats import artifact

_MADE_BY = {"shards": "shard", "vqvae": "vqvae", "codes": "codes", "samples": "sample"}


def sections_of(stage: dvc_yaml.Stage, settings: Params) -> dict[str, Any]:
    """Pick the settings that dvc.yaml lists for a stage, by their keys there."""
    return {
        key: settings.priors[stage.level] if key == f"priors.{stage.level}" else getattr(settings, key)
        for key in stage.params
    }


def digests(stage: dvc_yaml.Stage, settings: Params) -> dict[str, str]:
    """Digest each input of a stage; refuse one that is missing or half written."""
    found = {}
    for path in stage.artifacts:
        folders = [Path(path)]
        if path == "artifacts/priors":
            folders = [Path(path, level) for level in settings.priors]
        for folder in folders:
            manifest = folder / artifact.MANIFEST
            if not manifest.is_file():
                made_by = f"prior_{folder.name}" if folder.parent.name == "priors" else _MADE_BY[folder.name]
                raise UserError(
                    f"{stage.cli_name} reads {folder}, which {'is not whole' if folder.exists() else 'does not exist'}.",
                    where=folder.absolute(),
                    fix=f"Run: vqvae2 run --stage {made_by}",
                    code=4,
                )
            found[str(folder)] = artifact.sha256(manifest)
    if settings.dataset.source in stage.deps:
        found[settings.dataset.source] = _source_digest(Path(settings.dataset.source))
    return found


def _source_digest(source: Path) -> str:
    if source.is_file():
        return artifact.sha256(source)
    # DVC has just hashed the contents; to know a folder again, names, lengths and times will do.
    digest = hashlib.sha256()
    for path in sorted(source.rglob("*")):
        if path.is_file():
            status = path.stat()
            digest.update(
                f"{path.relative_to(source)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="replace")
            )
    return digest.hexdigest()


def fingerprint_of(stage: dvc_yaml.Stage, settings: Params, inputs: Mapping[str, str], code: Mapping[str, str]) -> str:
    """Name what a stage will make: a hash of its settings, its inputs and its code."""
    settled = [(key, _plain(section)) for key, section in sections_of(stage, settings).items()]
    whole = {"stage": stage.name, "settings": settled, "inputs": dict(inputs), "code": dict(code)}
    return hashlib.sha256(json.dumps(whole).encode()).hexdigest()


def code_of(stage: dvc_yaml.Stage) -> dict[str, str]:
    """Digest the files that decide what a stage makes."""
    code: dict[str, str] = {}
    for entry in map(Path, stage.code):
        files = sorted(path for path in entry.rglob("*") if path.suffix == ".py") if entry.is_dir() else [entry]
        code |= {path.as_posix(): artifact.sha256(path) for path in files if path.is_file()}
    return code


def _plain(section: Any) -> Any:
    if dataclasses.is_dataclass(section) and not isinstance(section, type):
        return dataclasses.asdict(section)
    return section
