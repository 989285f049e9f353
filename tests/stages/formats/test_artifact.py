"""Tests of artifact folders: atomic commits, manifests and checksums."""

import errno
import json
import os
import pickle
from pathlib import Path

import pytest
from safetensors import SafetensorError

from stages.errors import UserError
from stages.formats import artifact


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with artifact.commit_folder(tmp_path / "folder", "thing", {"count": 1}) as out:
        (out / "inner").mkdir()
        (out / "inner" / "file").write_bytes(b"contents")
    return tmp_path / "folder"


def test_a_committed_folder_is_read_back(folder: Path):
    """The artifact has the kind, the metadata and every file by its name in the folder."""
    thing = artifact.read(folder, "thing")
    thing.verify()
    assert thing.meta == {"count": 1} and list(thing.files) == ["inner/file"]


def test_an_error_in_the_block_keeps_the_previous_folder(folder: Path):
    """An incomplete result never replaces a complete one."""
    with pytest.raises(RuntimeError), artifact.commit_folder(folder, "thing", {"count": 2}):
        raise RuntimeError
    assert artifact.read(folder, "thing").meta == {"count": 1}
    assert [path.name for path in folder.parent.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "Error writing bytes to file. Detail: [errno 28] No space left on device"),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
@pytest.mark.parametrize("write", [lambda path: artifact.commit_folder(path, "thing", {}), artifact.atomic_write])
def test_errors_of_a_full_disk_name_the_path(tmp_path: Path, error: Exception, write):
    """Neither the system nor a library names the file in these errors."""
    number = getattr(error, "errno", errno.ENOSPC)
    with pytest.raises(OSError, match=os.strerror(number)) as caught, write(tmp_path / "folder"):
        raise error
    assert (caught.value.errno, caught.value.filename) == (number, str(tmp_path / "folder"))
    assert not list(tmp_path.iterdir())


def test_a_commit_replaces_the_whole_previous_folder(folder: Path):
    """No file of the previous folder stays."""
    with artifact.commit_folder(folder, "thing", {"count": 2}) as out:
        (out / "other").touch()
    thing = artifact.read(folder, "thing")
    assert thing.meta == {"count": 2} and list(thing.files) == ["other"] and not (folder / "inner").exists()


@pytest.mark.parametrize("name", ["/etc/hostname", "../secret", "inner/../../secret"])
def test_a_manifest_with_file_names_outside_the_folder_is_rejected(folder: Path, name: str):
    """No file outside the folder is ever opened."""
    (folder.parent / "secret").write_bytes(b"contents")
    path = folder / artifact.MANIFEST
    manifest = json.loads(path.read_bytes())
    manifest["files"][name] = manifest["files"]["inner/file"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="The manifest cannot be read"):
        artifact.read(folder, "thing")


@pytest.mark.parametrize("files", [[], {"inner/file": {}}, {"inner/file": {"bytes": None, "sha256": ""}}, None])
def test_an_invalid_manifest_raises_a_user_error(folder: Path, files: object):
    """It raises no KeyError or TypeError."""
    path = folder / artifact.MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "files": files}))
    with pytest.raises(UserError, match="The manifest cannot be read"):
        artifact.read(folder, "thing")


def test_verify_names_a_file_deleted_after_opening(folder: Path):
    """A deleted file is reported like a changed one."""
    thing = artifact.read(folder, "thing")
    (folder / "inner" / "file").unlink()
    with pytest.raises(UserError, match="inner/file is damaged"):
        thing.verify()


def test_a_missing_metadata_key_raises_a_user_error(folder: Path):
    """The error names the key, also after pickling."""
    thing = pickle.loads(pickle.dumps(artifact.read(folder, "thing")))
    with pytest.raises(UserError, match="The manifest has no key 'network'"):
        thing.meta["network"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / artifact.MANIFEST).unlink(), "{folder} is not complete: it has no manifest."),
        (lambda folder: folder.rename(folder.with_name("away")), "{folder} does not exist."),
        (
            lambda folder: _edit_manifest(folder, kind="other"),
            "The artifact must be 'thing' of format 1, got 'other' of format 1.",
        ),
        (
            lambda folder: _edit_manifest(folder, format=2),
            "The artifact must be 'thing' of format 1, got 'thing' of format 2.",
        ),
        (lambda folder: (folder / "inner" / "file").write_bytes(b"cut"), "inner/file must have 8 bytes, got 3."),
        (lambda folder: (folder / "inner" / "file").unlink(), "inner/file is missing."),
    ],
)
def test_an_unreadable_artifact_names_the_stage_that_writes_it(folder: Path, change, message: str):
    """The error has the folder and the command to run."""
    change(folder)
    message = message.format(folder=folder)
    with pytest.raises(UserError) as caught:
        artifact.read(folder, "thing", stage="make")
    assert (caught.value.what, caught.value.where, caught.value.code) == (message, str(folder), 4) or (
        caught.value.what == message and caught.value.where == str(folder / artifact.MANIFEST)
    )
    assert caught.value.fix == "Run: vqvae2 run --stage make"


def _edit_manifest(folder: Path, **values: object) -> None:
    path = folder / artifact.MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **values}))


def test_a_checksum_is_valid_only_for_the_unchanged_file(tmp_path: Path):
    """It is invalid before it is written, and for a changed, truncated or deleted file."""
    path = tmp_path / "part"
    path.write_bytes(b"contents")
    assert not artifact.has_valid_checksum(path)
    artifact.write_checksum(path)
    assert artifact.has_valid_checksum(path)
    for data in (b"contentz", b"content", b""):
        path.write_bytes(data)
        assert not artifact.has_valid_checksum(path)
    path.unlink()
    assert not artifact.has_valid_checksum(path)


@pytest.mark.parametrize(
    ("kind", "absence"), [("vqvae", "there is no trained VQ-VAE"), ("samples", "there are no samples")]
)
def test_missing_folder_is_named_with_what_is_missing(tmp_path: Path, monkeypatch, kind: str, absence: str):
    """The path is relative to the project, also if the reader has the whole path."""
    monkeypatch.chdir(tmp_path)
    for folder in (Path("artifacts", kind), tmp_path / "artifacts" / kind):
        with pytest.raises(UserError, match=f"^artifacts/{kind} does not exist: {absence}\\."):
            artifact.read(folder, kind)
