"""Artifact: a folder of files with a manifest, written atomically. Stage outputs and checkpoints are artifacts.

Files are written into a hidden folder beside the target, hashed into `manifest.json`, and committed by one rename: a
process killed at any moment leaves the previous folder intact. Readers reject a folder without a manifest.

    manifest.json   {"format": 1, "kind": ..., "meta": {...}, "files": {name: {"bytes": n, "sha256": ...}}}

The digest of an artifact is the SHA-256 of its manifest. The manifest holds the hash of every file, so artifacts of
equal digests are byte-identical.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from stages.errors import UserError

MANIFEST = "manifest.json"
FORMAT = 1  # version of the manifest's layout
HASH_THREADS = min(8, os.cpu_count() or 1)  # hashing releases the GIL; more do not help one disk
ABSENCES = {  # end of the error about a missing folder of a kind
    "vqvae": ": there is no trained VQ-VAE",
    "prior": ": there is no trained prior",
    "classifier": ": there is no trained classifier",
    **{kind: f": there are no {kind}" for kind in ("shards", "codes", "samples")},
}


class _RequiredKeys(dict[str, Any]):
    """Metadata of a manifest. Raises UserError instead of KeyError for a missing key."""

    def __init__(self, meta: Mapping[str, Any], path: Path, fix: str):
        super().__init__(meta)
        self.path, self.fix = path, fix

    def __missing__(self, key: str) -> Any:
        raise UserError(f"The manifest has no key {key!r}.", where=self.path, fix=self.fix, code=4)

    def __reduce__(self):  # pickle would call __init__ without path and fix
        return _RequiredKeys, (dict(self), self.path, self.fix)


@dataclass(frozen=True)
class Artifact:
    """Handle of a committed folder."""

    folder: Path
    kind: str  # such as "codes"
    meta: Mapping[str, Any]  # JSON values set by the writer
    files: Mapping[str, Mapping[str, Any]]  # name relative to the folder -> bytes, sha256
    digest: str  # SHA-256 of the manifest

    def path(self, name: str) -> Path:
        """Return the path of a file by its name in the folder."""
        return self.folder / name

    def verify(self, *names: str) -> None:
        """Hash the named files, by default all. Raises UserError if one differs from the manifest."""
        checked = names or tuple(self.files)
        with ThreadPoolExecutor(HASH_THREADS) as pool:
            for name, intact in zip(checked, pool.map(self._is_intact, checked), strict=True):
                if not intact:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise UserError(
                        f"{name} is damaged: its contents differ from the manifest.",
                        where=self.folder,
                        fix=f"Delete {self.folder} and run: vqvae2 run. It regenerates or restores the folder.",
                        code=5,
                    )

    def _is_intact(self, name: str) -> bool:
        try:
            return sha256(self.folder / name) == str(self.files[name]["sha256"])
        except OSError:  # the disk fails, or the file was deleted after the manifest was read
            return False


def sha256(path: Path) -> str:
    """Hash a file; return hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; rename it to `path` when the block ends without an error.

    Raises OSError that names `path` if the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with _full_disk_errors_name(path):
            yield temporary
            fsync(temporary)  # without it, the file could be empty after a power failure
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_checksum(path: Path) -> None:
    """Write the SHA-256 of a finished file to `path`.sha256, which `has_valid_checksum` compares."""
    with atomic_write(_checksum_path(path)) as temporary:
        temporary.write_text(sha256(path), encoding="utf-8")


def has_valid_checksum(path: Path) -> bool:
    """Return True if a file exists, and its contents are those that `write_checksum` hashed."""
    try:
        return _checksum_path(path).read_text(encoding="utf-8") == sha256(path)
    except (OSError, UnicodeDecodeError):
        return False


def _checksum_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def recorded_checksum(path: Path) -> str:
    """Return the hash that `write_checksum` has recorded."""
    return _checksum_path(path).read_text(encoding="utf-8")


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file to `target`; copy it where the file system does not allow that, such as across disks."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@contextmanager
def commit_folder(
    folder: Path, kind: str, meta: dict[str, Any], hashes: Mapping[str, str] | None = None
) -> Iterator[Path]:
    """Yield an empty folder to write to; commit it as `folder` when the block ends without an error.

    Replaces an existing `folder`. `meta` and `hashes` are used at the end, so the block may add to them. `hashes` are
    the SHA-256 of files that their writer has hashed: these are not read again. Raises OSError that names `folder` if
    the disk is full.
    """
    temporary = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with _full_disk_errors_name(folder):
            yield temporary
            commit(temporary, folder, kind, meta, hashes or {})
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def _full_disk_errors_name(path: Path) -> Iterator[None]:
    """Add `path` to errors of a full disk. The operating system names a file only in errors of opening it."""
    try:
        yield
    except SafetensorError as error:  # its message quotes the error of the operating system
        if not (match := re.search(r"\(os error (\d+)\)", str(error))):
            raise
        number = int(match[1])
        raise OSError(number, os.strerror(number), str(path)) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename is None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise


def commit(
    temporary: Path, folder: Path, kind: str, meta: Mapping[str, Any], hashes: Mapping[str, str] | None = None
) -> None:
    """Write the manifest of the files in `temporary`, then rename `temporary` to `folder`.

    `hashes` are as in `commit_folder`.
    """
    paths = sorted(path for path in temporary.rglob("*") if path.is_file() and path.name != MANIFEST)
    names = [path.relative_to(temporary).as_posix() for path in paths]
    for path in paths:
        fsync(path)
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        digests = pool.map(lambda name: (hashes or {}).get(name) or sha256(temporary / name), names)
        files = {
            name: {"bytes": path.stat().st_size, "sha256": digest}
            for name, path, digest in zip(names, paths, digests, strict=True)
        }
    manifest = {"format": FORMAT, "kind": kind, "meta": dict(meta), "files": files}
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    fsync(temporary / MANIFEST)
    for path in {temporary, *(path.parent for path in paths)}:
        fsync(path)  # the file names are contents of their folder
    if folder.exists():
        # A rename cannot replace a folder that has files: rename the previous one first and delete it last.
        previous = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
        temporary.rename(folder)
        shutil.rmtree(previous)
    else:
        temporary.rename(folder)
    fsync(folder.parent)


def read(folder: Path, kind: str, stage: str = "") -> Artifact:
    """Read an artifact's manifest. `stage` is the stage that writes it, for the fix of an error.

    Raises UserError if the manifest is missing, invalid or of another kind, or if a file is missing or of another
    length. `Artifact.verify` checks the hashes, which takes reading every file.
    """
    fix = f"Run: vqvae2 run --stage {stage}" if stage else "Run the stage that writes it."
    path = folder / MANIFEST
    if not path.is_file():
        problem = (
            "is not complete: it has no manifest" if folder.is_dir() else f"does not exist{ABSENCES.get(kind, '')}"
        )
        raise UserError(f"{_shown(folder)} {problem}.", where=folder, fix=fix, code=4)
    raw = path.read_bytes()
    try:
        manifest = json.loads(raw)
        manifest_kind, version = manifest["kind"], manifest["format"]
        meta = _RequiredKeys(dict(manifest["meta"].items()), path, fix)
        files = manifest_files(manifest)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError("The manifest cannot be read.", where=path, fix=fix, code=4) from error
    if version != FORMAT or manifest_kind != kind:
        raise UserError(
            f"The artifact must be {kind!r} of format {FORMAT}, got {manifest_kind!r} of format {version}.",
            where=path,
            fix=fix,
            code=4,
        )
    for name, properties in files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError:
            raise UserError(f"{name} is missing.", where=folder, fix=fix, code=4) from None
        if size != properties["bytes"]:
            raise UserError(f"{name} must have {properties['bytes']} bytes, got {size}.", where=folder, fix=fix, code=4)
    return Artifact(folder, kind, meta, files, hashlib.sha256(raw).hexdigest())


def kind(folder: Path) -> str:
    """Return the kind of an artifact; "" if its manifest cannot be read, which `read` then reports."""
    try:
        return str(json.loads((folder / MANIFEST).read_bytes())["kind"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _shown(folder: Path) -> Path:
    """Return a folder's path as it is shown: relative inside of the current folder."""
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def manifest_files(manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the bytes and sha256 of every file in a manifest. Raises ValueError if a name leads outside the folder."""
    return {
        _check_inside(name): {"bytes": int(properties["bytes"]), "sha256": str(properties["sha256"])}
        for name, properties in manifest["files"].items()
    }


def _check_inside(name: str) -> str:
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise ValueError(f"a file name must be inside the folder, got {name}")
    return name


def fsync(path: Path) -> None:
    """Flush a file's contents, or a folder's file names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
