"""Identity of an experiment: a hash of what determines its results, which is part of its name.

settings   those that the stages read
code       versions of the stages' results, with the files of evaluate.networks
images     contents of dataset.source
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from models.config import plain_settings
from pipeline import dvc_yaml, params, result_versions
from pipeline.checks.inputs import dvc_file_of
from pipeline.sections import sections_of
from stages.config import Params
from stages.tracking.tags import git

DIGITS = 8  # hexadecimal digits of an identity
CLEAN = "## "  # start of the line with the branch, the only line of `git status` without changes


class ExperimentIdentities:
    """Identities of several experiments. Files are read once, so an instance is for one moment."""

    def __init__(self) -> None:
        self._versions: dict[Any, str] = {}
        self._sources: dict[str, Any] = {}

    def compute(self, stages: Mapping[str, dvc_yaml.Stage], settings: Params) -> str:
        """Hash the settings and versions of the stages, and the images."""
        source = settings.dataset.source
        if source not in self._sources:
            self._sources[source] = describe_contents(Path(source))
        contents = [
            (name, plain_settings(sections_of(stage, settings)), self._version(stage, settings))
            for name, stage in stages.items()
        ]
        return hashlib.sha256(json.dumps([contents, self._sources[source]]).encode()).hexdigest()[:DIGITS]

    def _version(self, stage: dvc_yaml.Stage, settings: Params) -> str:
        # Of all settings, a version depends on these only: hashing the source of a stage takes a tenth of a second.
        network = settings.priors[stage.key].network.name if stage.module == "prior" else ""
        key = (stage, network, tuple(settings.evaluate.networks.items()))
        if key not in self._versions:
            self._versions[key] = result_versions.current_version(stage, settings)
        return self._versions[key]


def describe_contents(source: Path) -> Any:
    """Return what identifies the contents of a file or folder of images, as data for JSON.

    Of a source that DVC tracks these are its hashes, of one in Git without changes the id of the object, else names,
    sizes and times of change. The times differ between copies, so another computer may repeat an experiment.
    """
    if pointer := dvc_file_of(source):
        return params.read(pointer).get("outs", [])
    id_in_git = git("rev-parse", "--verify", "--quiet", f"HEAD:./{source.as_posix()}")
    # With its branch, the status of an unchanged source is a line; a command that fails gives none.
    status = git("status", "--porcelain", "--branch", "--", str(source)) if id_in_git else ""
    if status.startswith(CLEAN) and len(status.splitlines()) == 1:
        return id_in_git
    return list(_list_files(source))


def _list_files(source: Path) -> Iterator[tuple[str, int, int]]:
    """Yield name, bytes and time of change, in ns, of each file; nothing if the source does not exist."""
    for path in [source] if source.is_file() else sorted(source.rglob("*")):
        if path.is_file():
            stat = path.stat()
            yield path.relative_to(source).as_posix(), stat.st_size, stat.st_mtime_ns
