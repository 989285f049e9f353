"""Parts on nodes without a shared disk: inputs and outputs travel through the storage.

Inputs are uploaded once, under their digests. The output of a part (its files and its result) is uploaded as an
artifact under the hash of the part's description, so a rerun skips finished parts, on whatever node they ran.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.formats import artifact
from stages.formats.artifact import MANIFEST
from stages.runtime.context import StageContext
from stages.runtime.node_cache import node_cache_dir
from stages.runtime.storage import CorruptArtifactError, Storage, StoredArtifact

KIND, RESULT = "part", "result.safetensors"  # artifact kind of a part's output, and the file with its result
# Path on the sending node -> artifacts in that folder by name, or {"": artifact} if the path itself is one.
Inputs = Mapping[str, Mapping[str, StoredArtifact]]


@dataclass(frozen=True)
class TransferPlan:
    """Inputs, output folder and storage of the parts of one stage. It is sent to every worker."""

    storage: Storage  # holds the parts' outputs
    inputs: Inputs
    work_dir: str  # folder on the sending node that receives the parts' files; "" if the mapper writes none

    @classmethod
    def create(cls, context: StageContext, arguments: tuple[Any, ...], parts: list[Any]) -> "TransferPlan | None":
        """Upload the artifacts that arguments and parts name by path.

        Returns None if a path names anything else, such as raw images: then the parts must run on this node.
        """
        assert context.storage
        paths = set(_paths([*arguments, *parts]))
        work_dirs = {
            path
            for path in paths
            # An artifact in the work folder is an input, made of the results of earlier parts.
            if Path(path).is_relative_to(context.work_dir) and not (Path(path) / MANIFEST).is_file()
        }
        artifacts = {path: _artifacts_by_name(Path(path)) for path in paths - work_dirs}
        if len(work_dirs) > 1 or not all(artifacts.values()):
            return None
        root = Storage(context.cluster.storage)
        inputs = {
            path: {name: StoredArtifact.upload(folder, root) for name, folder in folders.items()}
            for path, folders in artifacts.items()
        }
        return cls(context.storage.child("parts"), inputs, next(iter(work_dirs), ""))

    def finished_parts(self) -> set[str]:
        """Return the digests of the parts whose output is in the storage."""
        return set(self.storage.list_artifacts())

    def fetch_result(self, digest: str, temporary_dir: Path) -> bytes | None:
        """Download a part's files to `work_dir` and return its result.

        Deletes an output that is damaged, or of a version that named the result otherwise, and returns None, so that
        the part runs again.
        """
        folder = temporary_dir / "fetched" / digest
        try:
            output = self.storage.fetch(digest, folder, KIND)
        except CorruptArtifactError:
            output = None
        if output is None or RESULT not in output.files:
            self.storage.delete(digest)
            shutil.rmtree(folder, ignore_errors=True)
            return None
        for file in output.files.keys() - {RESULT}:
            output.path(file).replace(Path(self.work_dir, file))
        result = output.path(RESULT).read_bytes()
        shutil.rmtree(folder)
        return result


class NodeWorkspace:
    """Folder of one worker on its node: downloaded inputs, and an output folder."""

    def __init__(self, plan: TransferPlan):
        self.plan = plan
        # Deleted with the process, unless the process is killed.
        self._temporary_dir = tempfile.TemporaryDirectory(dir=node_cache_dir("parts"))
        self.folder = Path(self._temporary_dir.name)
        self.work_dir = self.folder / "work"
        self.work_dir.mkdir()
        self._local_paths = {path: self._download(artifacts) for path, artifacts in plan.inputs.items()}
        if plan.work_dir:
            self._local_paths[plan.work_dir] = self.work_dir

    def localize_paths(self, value: Any) -> Any:
        """Replace the sending node's paths with this node's, in nested dicts, lists and tuples."""
        if isinstance(value, dict):
            return {key: self.localize_paths(item) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(map(self.localize_paths, value))
        if isinstance(value, (str, Path)) and (local_path := self._local_paths.get(str(value))):
            return type(value)(local_path)
        return value

    def upload_result(self, digest: str, result: bytes) -> None:
        """Upload a part's result and the files in `work_dir`, which is empty afterwards."""
        output = self.folder / digest
        with artifact.commit_folder(output, KIND, {}) as folder:
            for path in sorted(self.work_dir.iterdir()):
                path.rename(folder / path.name)
            (folder / RESULT).write_bytes(result)
        self.plan.storage.upload(output, digest)
        shutil.rmtree(output)

    def _download(self, artifacts: Mapping[str, StoredArtifact]) -> Path:
        """Download the artifacts of one input path; return the local path that replaces it."""
        if "" in artifacts:
            return artifacts[""].fetch()
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        for name, stored in artifacts.items():
            (folder / name).symlink_to(stored.fetch())
        return folder


def part_digest(part: Mapping[str, Any]) -> str:
    """Return a hash of a part's description."""
    return hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()[:32]


def _paths(value: Any) -> Iterator[str]:
    """Yield every Path, and every string that begins with /, in nested dicts, lists and tuples."""
    if isinstance(value, dict):
        for item in value.values():
            yield from _paths(item)
    elif type(value) in (list, tuple):
        for item in value:
            yield from _paths(item)
    elif isinstance(value, Path) or (isinstance(value, str) and value.startswith("/")):
        yield str(value)


def _artifacts_by_name(folder: Path) -> dict[str, Path]:
    """Return {"": folder} if a folder is an artifact, else the artifacts in it by name."""
    if (folder / MANIFEST).is_file():
        return {"": folder}
    return {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{MANIFEST}"))}
