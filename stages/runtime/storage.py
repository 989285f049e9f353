"""Artifact folders in an object store, for nodes without a shared disk.

An upload writes the manifest last, so an artifact in the store is complete or absent. A store is not trusted: every
write is read back and hashed, and every download is hashed again. Failed calls are retried (`MAX_ATTEMPTS`); retries of
MLflow's calls are in stages/tracking/.

    URL/inputs/DIGEST/                              an input artifact, uploaded once for all runs
    URL/runs/STAGE/FINGERPRINT/step-000001000/      a checkpoint
    URL/runs/STAGE/FINGERPRINT/parts/DIGEST/        the output of one part of a stage

URL is an fsspec URL such as s3://bucket/prefix. Endpoints and keys come from the environment.
"""

import errno
import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from stages.errors import UserError, install_command
from stages.formats import artifact
from stages.formats.artifact import MANIFEST, Artifact
from stages.runtime.node_cache import LocalDiskError, local_disk_errors, node_cache_dir

MAX_ATTEMPTS = 7
FIRST_RETRY_DELAY_S = 1.0  # doubles with each retry: 63 s in total, for a store that is away for a minute
DOWNLOAD_ATTEMPTS = 2  # of a file with a wrong hash: the transfer may have damaged it
GLOB_CHARACTERS = "*?["  # fsspec expands them in names, so a delete would reach other folders
LOCAL_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}  # only a local disk raises these while downloading


class CorruptArtifactError(UserError):
    """Contents of the store that differ from what was uploaded."""


class StorageUnavailableError(UserError):
    """Store that does not answer, or refuses access."""


@dataclass(frozen=True)
class Storage:
    """Folder of an object store that holds artifact folders.

    Every method that reaches the store retries failures, and raises StorageUnavailableError if they last.
    """

    url: str
    retry_delay_s: float = FIRST_RETRY_DELAY_S

    def child(self, *names: str) -> "Storage":
        """Return a subfolder. It need not exist."""
        return replace(self, url="/".join((self.url.rstrip("/"), *names)))

    def filesystem(self) -> tuple[Any, str]:
        """Return fsspec's file system and the path of this folder in it.

        Raises StorageUnavailableError if the URL holds glob characters, or its protocol is unknown or not installed.
        """
        import fsspec

        if set(GLOB_CHARACTERS) & set(self.url):
            raise StorageUnavailableError(
                f"cluster.storage must have none of {' '.join(GLOB_CHARACTERS)}, which stores expand as patterns.",
                where=f"cluster.storage: {self.url}",
                fix="Use a URL without them.",
                code=2,
            )
        options = {"auto_mkdir": True} if self.url.startswith("file:") else {}  # object stores have no folders to make
        try:
            return fsspec.core.url_to_fs(self.url, use_listings_cache=False, **options)
        except (ImportError, ValueError) as error:
            raise StorageUnavailableError(
                f"The storage cannot be opened: {error}.",
                where=f"cluster.storage: {self.url}",
                fix=f"Use a URL such as s3://bucket/prefix. S3 needs: {install_command('s3')}",
                code=3,
            ) from error

    def check(self) -> None:
        """Raise StorageUnavailableError, without retries, if the storage cannot be written to."""
        fs, root = self.filesystem()
        try:
            self._retry(lambda: fs.pipe_file(f"{root}/.probe", b"?"), attempts=1)
            self._retry(lambda: fs.rm_file(f"{root}/.probe"), attempts=1)
        except FileNotFoundError as error:
            raise _unavailable(self.url, "it does not exist") from error

    def list_artifacts(self) -> list[str]:
        """Return the sorted names of the complete artifacts."""
        fs, root = self.filesystem()
        manifests = self._retry(lambda: fs.glob(f"{root}/*/{MANIFEST}"))
        return sorted(path.split("/")[-2] for path in manifests)

    def exists(self, name: str) -> bool:
        """Return True if the store has a complete artifact of this name."""
        fs, root = self.filesystem()
        return bool(self._retry(lambda: fs.exists(f"{root}/{name}/{MANIFEST}")))

    def upload(self, folder: Path, name: str) -> None:
        """Upload an artifact folder as `name`, replacing another one; return once every file has been read back.

        Files that the store already has are skipped, so two jobs may upload the same artifact at once. Raises UserError
        if the local artifact is damaged.
        """
        fs, root = self.filesystem()
        local_artifact = artifact.read(folder, json.loads((folder / MANIFEST).read_bytes())["kind"])
        # A damaged local file must neither reach the store nor be blamed on it.
        local_artifact.verify()
        hashes = {file: str(properties["sha256"]) for file, properties in local_artifact.files.items()}
        target = f"{root}/{name}"
        if self._retry(lambda: _remote_hash(fs, f"{target}/{MANIFEST}")) not in ("", local_artifact.digest):
            # Without a manifest the old artifact counts as absent while its files are being replaced.
            self._retry(lambda: _remove(fs, f"{target}/{MANIFEST}"))
        for file, sha256 in (*hashes.items(), (MANIFEST, local_artifact.digest)):
            if self._retry(partial(_remote_hash, fs, f"{target}/{file}")) != sha256:
                self._retry(partial(_put, fs, folder / file, f"{target}/{file}", sha256))

    def fetch(self, name: str, folder: Path, kind: str) -> Artifact:
        """Download an artifact to `folder`, unless an intact copy is already there; return it verified.

        Only one process at a time may call this for a folder. Raises CorruptArtifactError if the stored artifact is
        damaged or absent, and LocalDiskError if this node cannot write it.
        """
        with local_disk_errors(folder):
            return self._fetch(name, folder, kind)

    def _fetch(self, name: str, folder: Path, kind: str) -> Artifact:
        fs, root = self.filesystem()
        url, temporary = f"{self.url}/{name}", folder.with_name(f".{folder.name}.fetching")
        shutil.rmtree(temporary, ignore_errors=True)
        file = MANIFEST
        try:
            manifest = self._retry(lambda: fs.cat_file(f"{root}/{name}/{MANIFEST}"))
            if _has_intact_copy(folder, kind, manifest):
                return artifact.read(folder, kind)
            temporary.mkdir(parents=True)
            (temporary / MANIFEST).write_bytes(manifest)
            for file, sha256 in _file_hashes(manifest, url).items():
                target = temporary / file
                target.parent.mkdir(parents=True, exist_ok=True)
                for _ in range(DOWNLOAD_ATTEMPTS):
                    self._retry(partial(_get, fs, f"{root}/{name}/{file}", target))
                    if intact := artifact.sha256(target) == sha256:
                        break
                if not intact:
                    raise _corrupt(f"{file} is damaged: its contents are not what was uploaded.", url)
            artifact.read(temporary, kind)
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
        except (CorruptArtifactError, StorageUnavailableError, LocalDiskError):
            raise
        except (UserError, FileNotFoundError) as error:
            what = error.what if isinstance(error, UserError) else f"{file} is missing."
            raise _corrupt(what, url) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return artifact.read(folder, kind)

    def delete(self, name: str) -> None:
        """Delete an artifact, its manifest first, so that an interrupted delete leaves no complete artifact."""
        fs, root = self.filesystem()

        def delete() -> None:
            _remove(fs, f"{root}/{name}/{MANIFEST}")
            with suppress(FileNotFoundError):
                fs.rm(f"{root}/{name}", recursive=True)

        self._retry(delete)

    def quarantine(self, name: str) -> None:
        """Rename the manifest of an artifact, so that it counts as absent.

        The files stay, because the damage may come from this reader's memory or network.
        """
        fs, root = self.filesystem()
        manifest = f"{root}/{name}/{MANIFEST}"

        def rename() -> None:
            with suppress(FileNotFoundError):  # another worker was faster
                fs.pipe_file(f"{manifest}.damaged", fs.cat_file(manifest))
                fs.rm_file(manifest)

        self._retry(rename)

    def clear(self) -> None:
        """Delete the whole folder."""
        fs, root = self.filesystem()

        def delete() -> None:
            with suppress(FileNotFoundError):
                fs.rm(root, recursive=True)

        self._retry(delete)

    def _retry(self, call: Callable[[], Any], attempts: int = MAX_ATTEMPTS) -> Any:
        """Call with retries. FileNotFoundError and UserError pass at once, since a retry cannot change them."""
        for attempt in range(attempts):
            try:
                return call()
            except (FileNotFoundError, UserError):
                raise
            except Exception as error:  # every store raises its own types
                if attempt == attempts - 1 or isinstance(error, PermissionError):
                    raise _unavailable(self.url, str(error) or type(error).__name__) from error
                time.sleep(self.retry_delay_s * 2**attempt)


@dataclass(frozen=True)
class StoredArtifact:
    """Reference to an input artifact in the storage, which other nodes can fetch."""

    storage: Storage
    digest: str
    kind: str

    @classmethod
    def upload(cls, folder: Path, storage: Storage) -> "StoredArtifact":
        """Upload an artifact under its digest, unless the storage has it."""
        manifest = (folder / MANIFEST).read_bytes()
        digest, inputs = hashlib.sha256(manifest).hexdigest(), storage.child("inputs")
        if not inputs.exists(digest):
            inputs.upload(folder, digest)
        return cls(inputs, digest, json.loads(manifest)["kind"])

    def fetch(self) -> Path:
        """Download the artifact to this node's cache, once for all its processes; return the folder.

        Raises CorruptArtifactError if the stored artifact has another digest.
        """
        folder = node_cache_dir("inputs") / self.digest
        with local_disk_errors(folder), folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not self._is_cached(folder):  # a cached copy was hashed when it was downloaded
                fetched = self.storage.fetch(self.digest, folder, self.kind)
                if fetched.digest != self.digest:
                    what = f"The digest of this {self.kind} must be {self.digest[:12]}, got {fetched.digest[:12]}."
                    raise _corrupt(what, f"{self.storage.url}/{self.digest}")
        return folder

    def _is_cached(self, folder: Path) -> bool:
        """Return True if the cache has the artifact with every file at full length.

        Cleaners delete files from caches, and power failures truncate them.
        """
        try:
            return artifact.read(folder, self.kind).digest == self.digest
        except UserError:
            return False


def _corrupt(what: str, url: str) -> CorruptArtifactError:
    return CorruptArtifactError(what, where=url, fix="Delete it there, then run the same command again.", code=5)


def _unavailable(url: str, reason: str) -> StorageUnavailableError:
    return StorageUnavailableError(
        f"The storage does not work: {reason}.",
        where=f"cluster.storage: {url}",
        fix="Fix the URL, the store, or the keys in the environment, then run the same command again.",
        code=3,
    )


def _put(fs: Any, source: Path, target: str, sha256: str) -> None:
    """Write one file and read it back. Raises OSError if the store does not return what was written."""
    with suppress(FileNotFoundError):  # raised for a bucket that does not exist; the read below reports it
        fs.put_file(str(source), target)
    remote_hash = _remote_hash(fs, target)
    if not remote_hash:  # OSError rather than FileNotFoundError, so that `_retry` tries again
        raise OSError(f"it does not have {target}, which was just written")
    if remote_hash != sha256:
        raise OSError(f"it returns other contents of {target} than were written")


def _remote_hash(fs: Any, path: str) -> str:
    """Return the SHA-256 of a file in the store, or "" if there is none."""
    try:
        with fs.open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return ""


def _remove(fs: Any, path: str) -> None:
    with suppress(FileNotFoundError):
        fs.rm_file(path)


def _get(fs: Any, source: str, target: Path) -> None:
    """Download one file. Raises LocalDiskError for an error of the local disk, since retries do not help there."""
    try:
        fs.get_file(source, str(target))
    except OSError as error:
        if error.errno in LOCAL_DISK_ERRORS or error.filename == str(target):
            with local_disk_errors(target.parent):
                raise
        raise


def _file_hashes(manifest: bytes, url: str) -> dict[str, str]:
    """Return the hash of every file in a manifest. Raises CorruptArtifactError if it is invalid."""
    try:
        files = artifact.manifest_files(json.loads(manifest))
        return {name: properties["sha256"] for name, properties in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _corrupt("The manifest cannot be read.", url) from error


def _has_intact_copy(folder: Path, kind: str, manifest: bytes) -> bool:
    """Return True if the folder holds the artifact of this manifest, with every hash correct."""
    try:
        if (folder / MANIFEST).read_bytes() != manifest:
            return False
        artifact.read(folder, kind).verify()
        return True
    except (OSError, UserError):
        return False
