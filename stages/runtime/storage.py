"""Artifact folders in an object store, where the nodes of a cluster meet that share no disk.

A folder is uploaded file by file and its manifest last, so that there, too, it is whole or absent. A store is not
believed: what is written is read back and hashed before it counts, and hashed once more by whoever fetches it.

    URL/inputs/DIGEST/                              an artifact under its digest: uploaded once, for all runs
    URL/runs/STAGE/FINGERPRINT/step-000001000/      a checkpoint
    URL/runs/STAGE/FINGERPRINT/parts/DIGEST/        what one part of a stage has made

URL is what fsspec understands, such as s3://bucket/prefix; endpoints and keys come from the environment.
"""

import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from stages.errors import UserError
from stages.formats import artifact
from stages.formats.artifact import MANIFEST, Artifact

MAX_ATTEMPTS = 7
FIRST_RETRY_DELAY_S = 1.0  # between tries; each is twice the one before: a store may be away for a minute
PATTERNS = "*?["  # to fsspec these stand for other names, of which it would read and remove all that fit
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}  # what only the disk that is written to can mean


class Damaged(UserError):
    """What lies in the store is not what was put there."""


class Unreachable(UserError):
    """The store does not answer, or refuses."""


class Unwritable(UserError):
    """This node's own disk does not take what comes from the store."""


@dataclass(frozen=True)
class Storage:
    """One folder of an object store, full of artifact folders."""

    url: str

    def under(self, *names: str) -> "Storage":
        return Storage("/".join((self.url.rstrip("/"), *names)))

    def opened(self) -> tuple[Any, str]:
        """Return fsspec's file system, and this folder's path in it."""
        import fsspec

        if set(PATTERNS) & set(self.url):
            raise Unreachable(
                f"The storage's URL holds one of {' '.join(PATTERNS)}, which stores take for patterns.",
                where=f"cluster.storage: {self.url}",
                fix="Use a URL without them.",
                code=2,
            )
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
        """Put an artifact folder here under a name, in place of what had it; return once all has been read back.

        Two jobs may put the same folder here at a time: what is here already is left alone.
        """
        files, root = self.opened()
        made = artifact.read(folder, json.loads((folder / MANIFEST).read_bytes())["kind"])
        made.verify()  # or what has rotted here would be put there, or be the store's fault
        hashes = {file: str(entry["sha256"]) for file, entry in made.files.items()}
        place = f"{root}/{name}"
        if self._patiently(lambda: _kept(files, f"{place}/{MANIFEST}")) not in ("", made.digest):
            self._patiently(lambda: _remove(files, f"{place}/{MANIFEST}"))  # so that it is never half of each
        for file, sha256 in (*hashes.items(), (MANIFEST, made.digest)):
            if self._patiently(partial(_kept, files, f"{place}/{file}")) != sha256:
                self._patiently(partial(_put, files, folder / file, f"{place}/{file}", sha256))

    def fetch(self, name: str, folder: Path, kind: str) -> Artifact:
        """Bring a folder here from the store, unless it is here already; return it verified.

        One process at a time may do so. Raises Damaged where the store keeps something else than what was put there,
        and Unwritable where this node cannot keep it.
        """
        with _disk_of(folder):
            return self._fetch(name, folder, kind)

    def _fetch(self, name: str, folder: Path, kind: str) -> Artifact:
        files, root = self.opened()
        place, temporary = f"{self.url}/{name}", folder.with_name(f".{folder.name}.fetching")
        shutil.rmtree(temporary, ignore_errors=True)
        file = MANIFEST
        try:
            manifest = self._patiently(lambda: files.cat_file(f"{root}/{name}/{MANIFEST}"))
            if _is_here(folder, kind, manifest):
                return artifact.read(folder, kind)
            temporary.mkdir(parents=True)
            (temporary / MANIFEST).write_bytes(manifest)
            for file, sha256 in _listed(manifest, place).items():
                target = temporary / file
                target.parent.mkdir(parents=True, exist_ok=True)
                for _ in range(2):  # the way here may have done the damage
                    self._patiently(partial(_get, files, f"{root}/{name}/{file}", target))
                    if intact := artifact.sha256(target) == sha256:
                        break
                if not intact:
                    raise _damaged(f"{file} is damaged: its contents are not what was written.", place)
            artifact.read(temporary, kind)
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
        except (Damaged, Unreachable, Unwritable):
            raise
        except (UserError, FileNotFoundError) as error:
            what = error.what if isinstance(error, UserError) else f"{file} is missing."
            raise _damaged(what, place) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return artifact.read(folder, kind)

    def discard(self, name: str) -> None:
        """Take a folder away: its manifest first, so that it is never half there."""
        files, root = self.opened()

        def remove() -> None:
            _remove(files, f"{root}/{name}/{MANIFEST}")
            with suppress(FileNotFoundError):
                files.rm(f"{root}/{name}", recursive=True)

        self._patiently(remove)

    def set_aside(self, name: str) -> None:
        """Let a folder count no longer, and leave it where it is: the fault may be its reader's."""
        files, root = self.opened()
        manifest = f"{root}/{name}/{MANIFEST}"

        def rename() -> None:
            with suppress(FileNotFoundError):  # another worker has done it
                files.pipe_file(f"{manifest}.damaged", files.cat_file(manifest))
                files.rm_file(manifest)

        self._patiently(rename)

    def clear(self) -> None:
        """Take away all that lies here."""
        files, root = self.opened()

        def remove() -> None:
            with suppress(FileNotFoundError):
                files.rm(root, recursive=True)

        self._patiently(remove)

    def _patiently(self, call: Callable[[], Any], tries: int = MAX_ATTEMPTS) -> Any:
        """Try again after a failure, since stores have bad moments; a file that is not there is an answer."""
        for attempt in range(tries):
            try:
                return call()
            except (FileNotFoundError, UserError):
                raise
            except Exception as error:  # every store raises its own
                if attempt == tries - 1 or isinstance(error, PermissionError):
                    raise _trouble(self.url, str(error) or type(error).__name__) from error
                time.sleep(FIRST_RETRY_DELAY_S * 2**attempt)


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
        with _disk_of(folder), folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not self._is_in(folder):  # contents were verified on their way
                found = self.storage.fetch(self.digest, folder, self.kind)
                if found.digest != self.digest:
                    what = f"This is {self.kind} {found.digest[:12]}, not {self.digest[:12]}."
                    raise _damaged(what, f"{self.storage.url}/{self.digest}")
        return folder

    def _is_in(self, folder: Path) -> bool:
        """Say whether it lies here, no file missing or cut: caches are tidied, and power fails."""
        try:
            return artifact.read(folder, self.kind).digest == self.digest
        except UserError:
            return False


def node_folder(*names: str) -> Path:
    """Make a folder on this node for what the storage holds anyway; it may be deleted between runs."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(caches, "vqvae2", *names)
    with _disk_of(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _disk_of(folder: Path) -> Iterator[None]:
    """Name the node and the folder where its disk refuses; what the store refuses has become a UserError before."""
    try:
        yield
    except OSError as error:
        raise Unwritable(
            f"What comes from the storage cannot be kept on this node: {error.strerror or error}.",
            where=f"{folder} on {platform.node()}",
            fix="Free some space or mend the permissions there, then run the same command again.",
            code=3,
        ) from error


def _damaged(what: str, place: str) -> Damaged:
    return Damaged(what, where=place, fix="Delete it there, then run the same command again.", code=5)


def _trouble(url: str, reason: str) -> Unreachable:
    return Unreachable(
        f"The storage does not work: {reason}.",
        where=f"cluster.storage: {url}",
        fix="Mend the URL, the store, or the keys in the environment, then run the same command again.",
        code=3,
    )


def _put(files: Any, source: Path, target: str, sha256: str) -> None:
    """Write one file, and believe it only once it has been read back."""
    with suppress(FileNotFoundError):  # as where a bucket is not there
        files.put_file(str(source), target)
    kept = _kept(files, target)
    if not kept:  # a bad moment, here, and no answer
        raise OSError(f"it does not have {target}, which was written just now")
    if kept != sha256:
        raise OSError(f"it keeps something else than what was written to {target}")


def _kept(files: Any, target: str) -> str:
    """Hash a file that is there; "" if it is not."""
    try:
        with files.open(target, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return ""


def _remove(files: Any, target: str) -> None:
    with suppress(FileNotFoundError):
        files.rm_file(target)


def _get(files: Any, source: str, target: Path) -> None:
    """Read one file; an error of the disk here is not the store's, and does not pass by waiting."""
    try:
        files.get_file(source, str(target))
    except OSError as error:
        if error.errno in NO_ROOM or error.filename == str(target):
            with _disk_of(target.parent):
                raise
        raise


def _listed(manifest: bytes, place: str) -> dict[str, str]:
    """Read the hash of every file from a manifest; refuse one that cannot be read."""
    try:
        return {name: entry["sha256"] for name, entry in artifact.listed(json.loads(manifest)).items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged("The manifest cannot be read.", place) from error


def _is_here(folder: Path, kind: str, manifest: bytes) -> bool:
    """Say whether the folder of this very manifest lies here whole."""
    try:
        if (folder / MANIFEST).read_bytes() != manifest:
            return False
        artifact.read(folder, kind).verify()
        return True
    except (OSError, UserError):
        return False
