"""A folder that is whole or absent: what a stage leaves behind, and a checkpoint while it trains.

Files are written into a hidden neighbour, hashed into `manifest.json`, and made real by one rename, so that a
process killed at any moment leaves the folder as it was. A folder without a manifest does not exist for readers.

    manifest.json   {"format": 1, "kind": ..., "meta": {...}, "files": {name: {"bytes": n, "sha256": ...}}}

The digest of an artifact is the SHA-256 of its manifest, which names the hash of every file: two artifacts of one
digest are the same bytes.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from stages.errors import UserError

MANIFEST = "manifest.json"
FORMAT = 1


class _Meta(dict[str, Any]):
    """What a manifest says, which refuses to be asked for what it does not."""

    def __init__(self, said: Mapping[str, Any], path: Path, fix: str):
        super().__init__(said)
        self.path, self.fix = path, fix

    def __missing__(self, key: str) -> Any:
        raise UserError(f"The manifest does not say {key!r}.", where=self.path, fix=self.fix, code=4)

    def __reduce__(self):  # to other processes, too
        return _Meta, (dict(self), self.path, self.fix)


@dataclass(frozen=True)
class Artifact:
    """A committed folder."""

    folder: Path
    kind: str
    meta: Mapping[str, Any]  # what the writer had to say, as JSON
    files: Mapping[str, Mapping[str, Any]]  # name relative to the folder -> bytes, sha256
    digest: str  # SHA-256 of the manifest

    def path(self, name: str) -> Path:
        return self.folder / name

    def verify(self, *names: str) -> None:
        """Hash the named files, or all, and refuse those that are not as they were written."""
        for name in names or self.files:
            try:
                intact = sha256(self.folder / name) == self.files[name]["sha256"]
            except OSError:  # the disk gives no answer, or the file has gone meanwhile
                intact = False
            if not intact:
                raise UserError(
                    f"{name} is damaged: its contents are not what was written.",
                    where=self.folder,
                    fix=f"Delete {self.folder} and run: vqvae2 run. It is made anew or restored.",
                    code=5,
                )


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield another name to write a file under; the file becomes `path` once it is whole and on the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with _naming(path):
            yield temporary
            fsync(temporary)  # else it could turn out empty after a power cut
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def seal(path: Path) -> None:
    """Note down beside a file what it holds, so that it can be told from what becomes of it."""
    with atomic_write(_seal(path)) as temporary:
        temporary.write_text(sha256(path), encoding="utf-8")


def is_sealed(path: Path) -> bool:
    """Say whether a file is here, and still what it was when it was sealed."""
    try:
        return _seal(path).read_text(encoding="utf-8") == sha256(path)
    except (OSError, UnicodeDecodeError):
        return False


def _seal(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, or a copy where its disk allows none, as where it is another."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@contextmanager
def commit_folder(folder: Path, kind: str, meta: dict[str, Any]) -> Iterator[Path]:
    """Yield an empty folder to write into; commit it as `folder` when the block ends without an error.

    `meta` is read at the end, so the block may add to it. What stood at `folder` before is replaced.
    """
    temporary = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with _naming(folder):
            yield temporary
            commit(temporary, folder, kind, meta)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Have a full disk tell what was written to it: the system names only what cannot be opened."""
    try:
        yield
    except SafetensorError as error:  # quotes the system
        if not (quoted := re.search(r"\(os error (\d+)\)", str(error))):
            raise
        number = int(quoted[1])
        raise OSError(number, os.strerror(number), str(path)) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename is None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise


def commit(temporary: Path, folder: Path, kind: str, meta: Mapping[str, Any]) -> None:
    """Hash what lies in `temporary` into a manifest, and make it `folder` by one rename."""
    paths = sorted(path for path in temporary.rglob("*") if path.is_file() and path.name != MANIFEST)
    files = {}
    for path in paths:
        fsync(path)
        files[path.relative_to(temporary).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    manifest = {"format": FORMAT, "kind": kind, "meta": dict(meta), "files": files}
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    fsync(temporary / MANIFEST)
    for path in {temporary, *(path.parent for path in paths)}:
        fsync(path)  # the names in a folder are contents of it
    if folder.exists():
        # A folder cannot replace a full one in one step: the old one steps aside first, whole, and goes last.
        aside = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        temporary.rename(folder)
        shutil.rmtree(aside)
    else:
        temporary.rename(folder)
    fsync(folder.parent)


def read(folder: Path, kind: str, made_by: str = "") -> Artifact:
    """Read a folder's manifest, and check that it is of this kind and that no file is missing or of another length.

    Hashes are checked by `Artifact.verify`, where the contents are read.
    """
    fix = f"Run: vqvae2 run --stage {made_by}" if made_by else "Run the stage that makes it."
    path = folder / MANIFEST
    if not path.is_file():
        state = "is not complete" if folder.is_dir() else "does not exist"
        raise UserError(f"The {kind} {state}.", where=folder, fix=fix, code=4)
    raw = path.read_bytes()
    try:
        manifest = json.loads(raw)
        kind_found, version = manifest["kind"], manifest["format"]
        meta = _Meta(dict(manifest["meta"].items()), path, fix)
        files = listed(manifest)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError("The manifest cannot be read.", where=path, fix=fix, code=4) from error
    if version != FORMAT or kind_found != kind:
        raise UserError(
            f"This is {kind_found!r} of format {version}, not {kind!r} of format {FORMAT}.", where=path, fix=fix, code=4
        )
    for name, entry in files.items():
        try:
            found = (folder / name).stat().st_size
        except OSError:
            raise UserError(f"{name} is missing.", where=folder, fix=fix, code=4) from None
        if found != entry["bytes"]:
            raise UserError(f"{name} holds {found} bytes, not {entry['bytes']}.", where=folder, fix=fix, code=4)
    return Artifact(folder, kind, meta, files, hashlib.sha256(raw).hexdigest())


def listed(manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Read the length and the hash of every file from a manifest; refuse a name that leads out of the folder."""
    return {
        _inside(name): {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])}
        for name, entry in manifest["files"].items()
    }


def _inside(name: str) -> str:
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise ValueError(f"{name} leads out of the folder")
    return name


def fsync(path: Path) -> None:
    """Wait until the disk holds a file's contents, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
