"""A folder is whole or absent, and its manifest leads nowhere else."""

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
    with artifact.commit_folder(tmp_path / "made", "thing", {"count": 1}) as out:
        (out / "inner").mkdir()
        (out / "inner" / "file").write_bytes(b"contents")
    return tmp_path / "made"


def test_what_was_committed_is_read_back(folder: Path):
    """Kind, meta, and every file by its name in the folder."""
    found = artifact.read(folder, "thing")
    found.verify()
    assert found.meta == {"count": 1} and list(found.files) == ["inner/file"]


def test_a_block_that_fails_leaves_what_stood_there(folder: Path):
    """Half a result never replaces a whole one."""
    with pytest.raises(RuntimeError), artifact.commit_folder(folder, "thing", {"count": 2}):
        raise RuntimeError
    assert artifact.read(folder, "thing").meta == {"count": 1}
    assert [path.name for path in folder.parent.iterdir()] == ["made"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "Error writing bytes to file. Detail: [errno 28] No space left on device"),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
@pytest.mark.parametrize("way", [lambda path: artifact.commit_folder(path, "thing", {}), artifact.atomic_write])
def test_a_full_disk_is_told_in_the_words_of_the_system(tmp_path: Path, error: Exception, way):
    """With what was to be written, whoever met it: neither the system nor any library names that."""
    number = getattr(error, "errno", errno.ENOSPC)
    with pytest.raises(OSError, match=os.strerror(number)) as told, way(tmp_path / "made"):
        raise error
    assert (told.value.errno, told.value.filename) == (number, str(tmp_path / "made"))
    assert not list(tmp_path.iterdir())


def test_a_newer_result_replaces_an_older_one_whole(folder: Path):
    """No file of the older one stays."""
    with artifact.commit_folder(folder, "thing", {"count": 2}) as out:
        (out / "other").touch()
    found = artifact.read(folder, "thing")
    assert found.meta == {"count": 2} and list(found.files) == ["other"] and not (folder / "inner").exists()


@pytest.mark.parametrize("name", ["/etc/hostname", "../secret", "inner/../../secret"])
def test_a_manifest_that_names_files_elsewhere_is_refused(folder: Path, name: str):
    """Nothing outside of the folder is ever opened."""
    (folder.parent / "secret").write_bytes(b"contents")
    path = folder / artifact.MANIFEST
    manifest = json.loads(path.read_bytes())
    manifest["files"][name] = manifest["files"]["inner/file"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="The manifest cannot be read"):
        artifact.read(folder, "thing")


@pytest.mark.parametrize("files", [[], {"inner/file": {}}, {"inner/file": {"bytes": None, "sha256": ""}}, None])
def test_a_manifest_of_another_shape_is_refused_in_one_sentence(folder: Path, files: object):
    """A reader is told, and sees no KeyError."""
    path = folder / artifact.MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "files": files}))
    with pytest.raises(UserError, match="The manifest cannot be read"):
        artifact.read(folder, "thing")


def test_a_file_that_went_after_the_manifest_was_read_is_named(folder: Path):
    """As one that was changed is."""
    found = artifact.read(folder, "thing")
    (folder / "inner" / "file").unlink()
    with pytest.raises(UserError, match="inner/file is damaged"):
        found.verify()


def test_a_manifest_that_leaves_something_out_is_refused_when_that_is_needed(folder: Path):
    """In one sentence that names it, in whatever process it is asked for."""
    found = pickle.loads(pickle.dumps(artifact.read(folder, "thing")))
    with pytest.raises(UserError, match="The manifest does not say 'network'"):
        found.meta["network"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folder: (folder / artifact.MANIFEST).unlink(), "The thing is not complete."),
        (lambda folder: folder.rename(folder.with_name("away")), "The thing does not exist."),
        (lambda folder: _say(folder, kind="other"), "This is 'other' of format 1, not 'thing' of format 1."),
        (lambda folder: _say(folder, format=2), "This is 'thing' of format 2, not 'thing' of format 1."),
        (lambda folder: (folder / "inner" / "file").write_bytes(b"cut"), "inner/file holds 3 bytes, not 8."),
        (lambda folder: (folder / "inner" / "file").unlink(), "inner/file is missing."),
    ],
)
def test_what_is_no_such_artifact_is_told_with_the_stage_that_makes_it(folder: Path, change, says: str):
    """The folder is named, and the command."""
    change(folder)
    with pytest.raises(UserError) as caught:
        artifact.read(folder, "thing", made_by="make")
    assert (caught.value.what, caught.value.where, caught.value.code) == (says, str(folder), 4) or (
        caught.value.what == says and caught.value.where == str(folder / artifact.MANIFEST)
    )
    assert caught.value.fix == "Run: vqvae2 run --stage make"


def _say(folder: Path, **values: object) -> None:
    path = folder / artifact.MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **values}))


def test_a_seal_tells_what_has_become_of_a_file(tmp_path: Path):
    """Unsealed, changed, cut and gone are all one: not what was sealed."""
    path = tmp_path / "part"
    path.write_bytes(b"contents")
    assert not artifact.is_sealed(path)
    artifact.seal(path)
    assert artifact.is_sealed(path)
    for data in (b"contentz", b"content", b""):
        path.write_bytes(data)
        assert not artifact.is_sealed(path)
    path.unlink()
    assert not artifact.is_sealed(path)
