"""Parts done on nodes that have neither the inputs nor the work folder: both ways lead through the storage.

Inputs travel under their digests. What a part has made, its files and its result, travels back as an artifact under
the part's own digest; so a rerun finds finished parts finished, wherever they were done.
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
from stages.runtime.storage import Damaged, Storage, Stored, node_folder

KIND, RESULT = "part", "result.npz"
Inputs = Mapping[str, Mapping[str, Stored]]  # a path here -> the artifacts within, or under "" the one it is itself


@dataclass(frozen=True)
class TransferPlan:
    """What a worker elsewhere has to know."""

    storage: Storage
    inputs: Inputs
    work: str  # the folder here that stands for the one it writes to; "" if none does

    @classmethod
    def planned(cls, context: StageContext, arguments: tuple[Any, ...], parts: list[Any]) -> "TransferPlan | None":
        """Put what the arguments and the parts name into the storage; None if something is no artifact and stays."""
        assert context.storage
        paths = set(_paths([*arguments, *parts]))
        work = {path for path in paths if Path(path).is_relative_to(context.work)}
        found = {path: _artifacts(Path(path)) for path in paths - work}
        if len(work) > 1 or not all(found.values()):
            return None
        common = Storage(context.cluster.storage)
        inputs = {
            path: {name: Stored.upload(folder, common) for name, folder in inside.items()}
            for path, inside in found.items()
        }
        return cls(context.storage.under("parts"), inputs, next(iter(work), ""))

    def finished(self) -> set[str]:
        """Name the parts that somebody has done."""
        return set(self.storage.names())

    def fetch(self, name: str, into: Path) -> bytes | None:
        """Bring home what a part has made; return its result, or None if that is damaged and to be done again."""
        folder = into / "fetched" / name
        try:
            found = self.storage.fetch(name, folder, KIND)
        except Damaged:
            self.storage.discard(name)
            return None
        for file in found.files.keys() - {RESULT}:
            found.path(file).replace(Path(self.work, file))
        result = found.path(RESULT).read_bytes()
        shutil.rmtree(folder)
        return result


class NodeWorkspace:
    """A worker's side of the journey: inputs under this node's own paths, and a folder to write to."""

    def __init__(self, journey: TransferPlan):
        self.journey = journey
        self._scratch = tempfile.TemporaryDirectory(
            dir=node_folder("parts")
        )  # goes with the process, unless that is killed
        self.folder = Path(self._scratch.name)
        self.work = self.folder / "work"
        self.work.mkdir()
        self._here = {path: self._fetched(stored) for path, stored in journey.inputs.items()}
        if journey.work:
            self._here[journey.work] = self.work

    def localize_paths(self, value: Any) -> Any:
        """Put this node's paths in place of those of the node that sent them."""
        if isinstance(value, dict):
            return {key: self.localize_paths(each) for key, each in value.items()}
        if type(value) in (list, tuple):
            return type(value)(map(self.localize_paths, value))
        if isinstance(value, (str, Path)) and (path := self._here.get(str(value))):
            return type(value)(path)
        return value

    def upload_result(self, name: str, result: bytes) -> None:
        """Put what a part has made into the storage."""
        made = self.folder / name
        with artifact.commit_folder(made, KIND, {}) as folder:
            for path in sorted(self.work.iterdir()):
                path.rename(folder / path.name)
            (folder / RESULT).write_bytes(result)
        self.journey.storage.upload(made, name)
        shutil.rmtree(made)

    def _fetched(self, stored: Mapping[str, Stored]) -> Path:
        if "" in stored:
            return stored[""].fetch()
        together = Path(tempfile.mkdtemp(dir=self.folder))
        for name, each in stored.items():
            (together / name).symlink_to(each.fetch())
        return together


def digest(part: Mapping[str, Any]) -> str:
    """Name a part after all that it says."""
    return hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()[:32]


def _paths(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for each in value.values():
            yield from _paths(each)
    elif type(value) in (list, tuple):
        for each in value:
            yield from _paths(each)
    elif isinstance(value, Path) or (isinstance(value, str) and value.startswith("/")):
        yield str(value)


def _artifacts(folder: Path) -> dict[str, Path]:
    """List a folder that is an artifact, under "", or the artifacts in it by their names."""
    if (folder / MANIFEST).is_file():
        return {"": folder}
    return {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{MANIFEST}"))}
