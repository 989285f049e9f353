"""Tests of the verification of artifacts once per node."""

import os
import pwd
import time
from pathlib import Path

import pytest

from stages.errors import UserError
from stages.formats import artifact
from stages.formats.artifact import Artifact
from stages.runtime.node_cache import LocalDiskError, node_cache_dir
from stages.runtime.verification import mark_verified, verify_once

HOUR_NS = 3600 * 10**9


@pytest.fixture
def thing(tmp_path: Path, cache_dir: Path) -> Artifact:
    with artifact.commit_folder(tmp_path / "folder", "thing", {}) as out:
        (out / "file").write_bytes(b"contents")
    return artifact.read(tmp_path / "folder", "thing")


def hashed(target: Artifact, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the files that are hashed on verification."""
    names: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(artifact, "sha256", lambda path: names.append(path.name) or target.files[path.name]["sha256"])
        verify_once(target)
    return names


def test_a_verified_artifact_is_not_hashed_again(thing, monkeypatch):
    """It is hashed once; a copy in another folder is another artifact."""
    mark_verified(thing)
    assert hashed(thing, monkeypatch) == []
    thing.folder.rename(thing.folder.with_name("moved"))
    assert hashed(artifact.read(thing.folder.with_name("moved"), "thing"), monkeypatch) == ["file"]


def test_user_without_a_home_folder_verifies_every_time(thing, monkeypatch):
    """As in a container with a number for its user: there is no cache, and the artifact is read all the same."""

    def no_entry(user: int):
        raise KeyError(user)

    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    mark_verified(thing)
    assert hashed(thing, monkeypatch) == ["file"] == hashed(thing, monkeypatch)
    with pytest.raises(LocalDiskError, match="the user has no home folder") as caught:
        node_cache_dir("codes")
    assert "XDG_CACHE_HOME" in caught.value.fix and caught.value.code == 3


def test_a_file_that_has_just_changed_is_hashed_again(thing, monkeypatch):
    """A clock that ticks every few milliseconds could hide a second change."""
    changed = thing.path("file").stat().st_ctime_ns
    monkeypatch.setattr(time, "time_ns", lambda: changed + 1)
    assert hashed(thing, monkeypatch) == ["file"] == hashed(thing, monkeypatch)


def test_verification_is_noted_once_files_are_older(thing, monkeypatch):
    """The note is written by the first verification."""
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now + HOUR_NS)
    assert hashed(thing, monkeypatch) == ["file"] and hashed(thing, monkeypatch) == []


def test_a_flipped_bit_is_found_although_the_artifact_was_verified(thing):
    """Also if the time of modification is set back."""
    mark_verified(thing)
    path = thing.path("file")
    before = path.stat()
    path.write_bytes(b"Contents")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(UserError, match="file is damaged"):
        verify_once(thing)


def test_a_missing_file_is_reported(thing):
    """It is no reason for a traceback."""
    mark_verified(thing)
    thing.path("file").unlink()
    with pytest.raises(UserError, match="file is damaged"):
        verify_once(thing)


@pytest.mark.parametrize("note", [b"", b"[1]", b"{", b"\xff"])
def test_an_invalid_note_is_ignored(thing, cache_dir, monkeypatch, note: bytes):
    """The artifact is hashed."""
    mark_verified(thing)
    next((cache_dir / "vqvae2/verified").iterdir()).write_bytes(note)
    assert hashed(thing, monkeypatch) == ["file"]


def test_a_cache_that_cannot_be_written_costs_only_time(thing, monkeypatch):
    """Every verification hashes."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nobody")
    mark_verified(thing)
    assert hashed(thing, monkeypatch) == ["file"]
