"""Fingerprint of a stage's result: a hash of its settings, the digests of its inputs and its result version.

Equal fingerprints make equal artifacts. A fingerprint names the folder in runs/ that holds a stage's resumable state.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from models.config import plain_settings
from pipeline import dvc_yaml, result_versions
from pipeline.sections import sections_of
from stages.config import Params
from stages.errors import UserError
from stages.formats import artifact
from stages.runtime.context import work_folder_name

# artifact -> the stage that writes it
PRODUCERS = {
    "shards": "shard", "vqvae": "vqvae", "codes": "codes", "samples": "sample", "accepted": "reject_samples",
}  # fmt: skip
KEYED_PRODUCERS = {"priors": "prior", "classifiers": "classifier"}  # folder of artifacts -> the stage of each


def digest_inputs(stage: dvc_yaml.Stage, settings: Params) -> dict[str, str]:
    """Digest each input of a stage.

    Raises UserError if an input is missing or incomplete.
    """
    digests: dict[str, str] = {}
    for path in stage.artifacts:
        folders = [Path(path)]
        if path == "artifacts/priors":
            folders = [Path(path, level) for level in settings.priors]
        for folder in folders:
            manifest = folder / artifact.MANIFEST
            if not manifest.is_file():
                producer = PRODUCERS.get(folder.name, "")
                if folder.parent.name in KEYED_PRODUCERS:
                    producer = f"{KEYED_PRODUCERS[folder.parent.name]}_{folder.name}"
                state = "is incomplete" if folder.exists() else "does not exist"
                raise UserError(
                    f"{stage.cli_name} reads {folder}, which {state}.",
                    where=folder.absolute(),
                    fix=f"Run: vqvae2 run --stage {producer}",
                    code=4,
                )
            digests[str(folder)] = artifact.sha256(manifest)
    if settings.dataset.source in stage.deps:
        digests[settings.dataset.source] = _digest_source(Path(settings.dataset.source))
    return digests


def _digest_source(source: Path) -> str:
    if source.is_file():
        return artifact.sha256(source)
    # DVC has just hashed the contents. Names, lengths and times are enough to recognize a folder.
    digest = hashlib.sha256()
    for path in sorted(source.rglob("*")):
        if path.is_file():
            status = path.stat()
            digest.update(
                f"{path.relative_to(source)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="replace")
            )
    return digest.hexdigest()


def identify(stage: dvc_yaml.Stage, settings: Params) -> tuple[dict[str, str], str]:
    """Return the digests of a stage's inputs and the fingerprint of its result.

    Raises UserError if an input is missing or incomplete.
    """
    inputs = digest_inputs(stage, settings)
    return inputs, fingerprint_of(stage, settings, inputs, result_versions.version_of(stage, settings))


def work_folder(folder: Path, stage: dvc_yaml.Stage, settings: Params) -> Path:
    """Return the work folder of a stage with these settings; `folder` is the stage's folder in runs/.

    Raises UserError if an input is missing or incomplete.
    """
    return folder / work_folder_name(identify(stage, settings)[1])


def fingerprint_of(stage: dvc_yaml.Stage, settings: Params, inputs: Mapping[str, str], version: str) -> str:
    """Hash what determines a stage's result: its settings, its inputs and its result version."""
    sections = [(key, plain_settings(section)) for key, section in sections_of(stage, settings).items()]
    contents = {"stage": stage.name, "settings": sections, "inputs": dict(inputs), "version": version}
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()
