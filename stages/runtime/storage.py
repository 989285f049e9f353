"""Artifact folders in an object store, where the nodes of a cluster meet that share no disk.

A folder is uploaded file by file and its manifest last, so that there, too, it is whole or absent. A store is not
believed: what is written is read back and hashed before it counts, and hashed once more by whoever fetches it.

    URL/inputs/DIGEST/                              an artifact under its digest: uploaded once, for all runs
    URL/runs/STAGE/FINGERPRINT/step-000001000/      a checkpoint
    URL/runs/STAGE/FINGERPRINT/parts/DIGEST/        what one part of a stage has made

URL is what fsspec understands, such as s3://bucket/prefix; endpoints and keys come from the environment.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from stages.errors import UserError
from stages.formats import artifact
from stages.formats.artifact import MANIFEST, Artifact

TRIES = 7
FIRST_PAUSE_SECONDS = 1.0  # between tries; each is twice the one before: a store may be away for a minute


class Damaged(UserError):
    """What lies in the store is not what was put there."""


class Unreachable(UserError):
    """The store does not answer, or refuses."""


@dataclass(frozen=True)
class Storage:
    """One folder of an object store, full of artifact folders."""

    url: str

    def under(self, *names: str) -> "Storage":
        return Storage("/".join((self.url.rstrip("/"), *names)))

    def opened(self) -> tuple[Any, str]:
        """Return fsspec's file system, and this folder's path in it."""
        import fsspec

        disk = {"auto_mkdir": True} if self.url.startswith("file:") else {}  # buckets have no folders to make
        try:
            return fsspec.core.url_to_fs(self.url, use_listings_cache=False, **disk)
        except (ImportError, ValueError) as error:
            raise Unreachable(
                f"There is no way to reach this storage: {error}.",
                where=f"cluster.storage: {self.url}",
                fix="Use a URL such as s3://bucket/prefix; for S3, pip install 'vqvae2[s3]'.",
                code=3,
            ) from error

    def check(self) -> None:
        """Refuse at once a storage that cannot be written to."""
        files, root = self.opened()
        try:
            self._patiently(lambda: files.pipe_file(f"{root}/.probe", b"?"), tries=1)
            self._patiently(lambda: files.rm_file(f"{root}/.probe"), tries=1)
        except FileNotFoundError as error:
            raise _trouble(self.url, "there is no such place") from error

    def names(self) -> list[str]:
        """Name the whole folders that lie here, in order."""
        files, root = self.opened()
        found = self._patiently(lambda: files.glob(f"{root}/*/{MANIFEST}"))
        return sorted(path.split("/")[-2] for path in found)

    def holds(self, name: str) -> bool:
        """Say whether a whole folder of this name lies here."""
        files, root = self.opened()
        return bool(self._patiently(lambda: files.exists(f"{root}/{name}/{MANIFEST}")))

    def upload(self, folder: Path, name: str) -> None:
        """Put an artifact folder here under a name, in place of what had it; return once all has been read back."""
        files, root = self.opened()
        names = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        self.discard(name)
        for file in (*names, MANIFEST):
            self._patiently(partial(_put, files, folder / file, f"{root}/{name}/{file}"))

    def fetch(self, name: str, folder: Path, kind: str) -> Artifact:
        """Bring a folder here from the store, unless it is here already; return it verified.

        Raises Damaged where the store keeps something else than what was put there.
        """
        files, root = self.opened()
        temporary = folder.with_name(f".{folder.name}.fetching-{os.getpid()}")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            manifest = self._patiently(lambda: files.cat_file(f"{root}/{name}/{MANIFEST}"))
            if _is_here(folder, kind, manifest):
                return artifact.read(folder, kind)
            temporary.mkdir(parents=True)
            (temporary / MANIFEST).write_bytes(manifest)
            for file, sha256 in _listed(manifest, temporary).items():
                target = temporary / file
                target.parent.mkdir(parents=True, exist_ok=True)
                for _ in range(2):  # the way here may have done the damage
                    self._patiently(partial(files.get_file, f"{root}/{name}/{file}", str(target)))
                    if intact := artifact.sha256(target) == sha256:
                        break
                if not intact:
                    raise UserError(f"{file} is damaged: its contents are not what was written.", code=5)
            artifact.read(temporary, kind)
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
        except Unreachable:
            raise
        except (UserError, FileNotFoundError) as error:
            what = error.what if isinstance(error, UserError) else f"{error.args[-1]} is missing."
            raise Damaged(
                what, where=f"{self.url}/{name}", fix="Delete it there, then run the same command again.", code=5
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return artifact.read(folder, kind)

    def discard(self, name: str) -> None:
        """Take a folder away: its manifest first, so that it is never half there."""
        files, root = self.opened()

        def remove() -> None:
            with suppress(FileNotFoundError):
                files.rm_file(f"{root}/{name}/{MANIFEST}")
            with suppress(FileNotFoundError):
                files.rm(f"{root}/{name}", recursive=True)

        self._patiently(remove)

    def clear(self) -> None:
        """Take away all that lies here."""
        files, root = self.opened()

        def remove() -> None:
            with suppress(FileNotFoundError):
                files.rm(root, recursive=True)

        self._patiently(remove)

    def _patiently(self, call: Callable[[], Any], tries: int = TRIES) -> Any:
        """Try again after a failure, since stores have bad moments; a file that is not there is an answer."""
        for attempt in range(tries):
            try:
                return call()
            except FileNotFoundError:
                raise
            except Exception as error:  # every store raises its own
                if attempt == tries - 1 or isinstance(error, PermissionError):
                    raise _trouble(self.url, str(error) or type(error).__name__) from error
                time.sleep(FIRST_PAUSE_SECONDS * 2**attempt)


@dataclass(frozen=True)
class Stored:
    """An input on its way to other nodes: where it lies, and what it must turn out to be."""

    storage: Storage
    digest: str
    kind: str

    @classmethod
    def upload(cls, folder: Path, storage: Storage) -> "Stored":
        """Put an artifact into the storage, unless it is there."""
        manifest = (folder / MANIFEST).read_bytes()
        digest, inputs = hashlib.sha256(manifest).hexdigest(), storage.under("inputs")
        if not inputs.holds(digest):
            inputs.upload(folder, digest)
        return cls(inputs, digest, json.loads(manifest)["kind"])

    def fetch(self) -> Path:
        """Bring it to this node, once for all processes here."""
        folder = node_folder("inputs") / self.digest
        with folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.is_dir():  # what is there was verified on its way
                self.storage.fetch(self.digest, folder, self.kind)
        found = artifact.read(folder, self.kind)
        if found.digest != self.digest:
            raise UserError(f"This is not {self.kind} {self.digest[:12]}.", where=folder, fix="Delete it.", code=4)
        return folder


def node_folder(*names: str) -> Path:
    """Make a folder on this node for what the storage holds anyway; it may be deleted between runs."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(caches, "vqvae2", *names)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _trouble(url: str, reason: str) -> Unreachable:
    return Unreachable(
        f"The storage does not work: {reason}.",
        where=f"cluster.storage: {url}",
        fix="Mend the URL, the store, or the keys in the environment, then run the same command again.",
        code=3,
    )


def _put(files: Any, source: Path, target: str) -> None:
    """Write one file, and believe it only once it has been read back."""
    files.put_file(str(source), target)
    with files.open(target, "rb") as back:
        if hashlib.file_digest(back, "sha256").hexdigest() != artifact.sha256(source):
            raise OSError(f"it keeps something else than what was written to {target}")


def _listed(manifest: bytes, folder: Path) -> dict[str, str]:
    """Read the hash of every file from a manifest; refuse one that cannot be read, or that leads out of its folder."""
    try:
        hashes = {str(name): str(entry["sha256"]) for name, entry in json.loads(manifest)["files"].items()}
        inside = all((folder / name).resolve().is_relative_to(folder.resolve()) for name in hashes)
    except (ValueError, KeyError, TypeError, AttributeError):
        inside = False
    if not inside:
        raise UserError("The manifest cannot be read.", code=5)
    return hashes


def _is_here(folder: Path, kind: str, manifest: bytes) -> bool:
    """Say whether the folder of this very manifest lies here whole."""
    try:
        if (folder / MANIFEST).read_bytes() != manifest:
            return False
        artifact.read(folder, kind).verify()
        return True
    except (OSError, UserError):
        return False
