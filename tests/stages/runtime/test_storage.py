"""Storage: damage, losses and refusals of the store or of the local disk are detected, on upload and on download."""

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import fsspec
import pytest
import torch

from stages.config import ClusterConfig, TrainConfig
from stages.errors import UserError
from stages.formats import artifact
from stages.formats.artifact import MANIFEST
from stages.runtime.context import StageContext
from stages.runtime.node_cache import LocalDiskError
from stages.runtime.storage import (
    CorruptArtifactError,
    Storage,
    StorageUnavailableError,
    StoredArtifact,
)
from stages.training import ray_train
from stages.training.checkpoint import Checkpoints
from stages.training.checkpoint_state import TrainState
from tests.mini_pipeline import without_ray


@dataclass(frozen=True)
class FaultyStorage(Storage):
    """Storage whose transfers of single files are replaced: each gets the real method, the source and the target."""

    put_file: Callable[..., None] | None = None
    get_file: Callable[..., None] | None = None

    def filesystem(self) -> tuple[Any, str]:
        fs, root = super().filesystem()
        return FaultyFileSystem(fs, self), root


class FaultyFileSystem:
    """File system of a `FaultyStorage`."""

    def __init__(self, fs: Any, storage: FaultyStorage):
        self._fs, self._storage = fs, storage

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fs, name)

    def put_file(self, source: str, target: str) -> None:
        put = self._storage.put_file or (lambda real, source, target: real(source, target))
        put(self._fs.put_file, source, target)

    def get_file(self, source: str, target: str) -> None:
        get = self._storage.get_file or (lambda real, source, target: real(source, target))
        get(self._fs.get_file, source, target)


@pytest.fixture(params=["file", "memory"])
def storage(request, tmp_path: Path) -> Iterator[FaultyStorage]:
    """An empty storage, on a disk or in memory, that retries without delay and has no fault yet."""
    url = f"file://{tmp_path}/store" if request.param == "file" else "memory://store"
    yield FaultyStorage(url, retry_delay_s=0.0)
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An artifact of three files, one of them in a subfolder."""
    with artifact.commit_folder(tmp_path / "local", "thing", {"step": 3}) as folder:
        (folder / "a.bin").write_bytes(bytes(range(256)) * 40)
        (folder / "b").mkdir()
        (folder / "b" / "c.txt").write_text("c")
        (folder / "empty").touch()
    return tmp_path / "local"


@pytest.fixture
def other_folder(tmp_path: Path) -> Path:
    """An artifact of the same kind with another digest."""
    with artifact.commit_folder(tmp_path / "other", "thing", {}) as folder:
        (folder / "a.bin").write_bytes(b"other")
    return tmp_path / "other"


def damage(storage: Storage, name: str, offset: int = 5) -> None:
    """Flip a bit of a file in the store."""
    fs, root = storage.filesystem()
    data = bytearray(fs.cat_file(f"{root}/{name}"))
    data[offset % len(data)] ^= 1
    fs.pipe_file(f"{root}/{name}", bytes(data))


def test_fetched_artifact_equals_the_uploaded_one(storage: Storage, folder: Path, tmp_path: Path):
    """Digest and bytes are equal, and the artifact is listed."""
    storage.upload(folder, "x")
    assert storage.list_artifacts() == ["x"] and storage.exists("x") and not storage.exists("y")
    fetched = storage.fetch("x", tmp_path / "fetched", "thing")
    assert fetched.digest == artifact.read(folder, "thing").digest
    assert (tmp_path / "fetched" / "b" / "c.txt").read_text() == "c"


def test_artifact_without_a_manifest_is_absent(storage: Storage, folder: Path):
    """An upload writes the manifest last, and a delete removes it first."""
    storage.upload(folder, "x")
    fs, root = storage.filesystem()
    fs.rm_file(f"{root}/x/{MANIFEST}")
    assert storage.list_artifacts() == []
    storage.upload(folder, "x")
    storage.delete("x")
    assert storage.list_artifacts() == [] and not fs.exists(f"{root}/x/a.bin")
    storage.upload(folder, "x")
    for _ in range(2):
        storage.clear()
        assert storage.list_artifacts() == []


@pytest.mark.parametrize("name", ["a.bin", "b/c.txt", MANIFEST])
def test_damage_in_the_store_is_never_fetched(storage: Storage, folder: Path, tmp_path: Path, name: str):
    """A flipped bit raises an error, and no folder is left behind."""
    storage.upload(folder, "x")
    for offset in range(0, 120, 13):
        damage(storage, f"x/{name}", offset)
        if name == MANIFEST:  # no hash covers it: either it becomes invalid, or the digest changes
            with pytest.raises((CorruptArtifactError, AssertionError)):
                fetched = storage.fetch("x", tmp_path / "fetched", "thing")
                assert fetched.digest == artifact.read(folder, "thing").digest
        else:
            with pytest.raises(CorruptArtifactError, match=r"damaged|holds") as caught:
                storage.fetch("x", tmp_path / "fetched", "thing")
            assert (caught.value.where, caught.value.code) == (f"{storage.url}/x", 5)
            assert caught.value.fix == "Delete it there, then run the same command again."
            assert not (tmp_path / "fetched").exists()
        damage(storage, f"x/{name}", offset)


def test_missing_file_is_reported_as_damage(storage: Storage, folder: Path, tmp_path: Path):
    """The error names the file."""
    storage.upload(folder, "x")
    fs, root = storage.filesystem()
    fs.rm_file(f"{root}/x/a.bin")
    with pytest.raises(CorruptArtifactError, match=r"a\.bin is missing"):
        storage.fetch("x", tmp_path / "fetched", "thing")


def test_manifest_with_paths_outside_the_folder_is_rejected(storage: Storage, folder: Path, tmp_path: Path):
    """Nothing is written outside the requested folder."""
    text = (folder / MANIFEST).read_text().replace('"a.bin"', '"../../a.bin"')
    storage.upload(folder, "x")
    fs, root = storage.filesystem()
    fs.pipe_file(f"{root}/x/{MANIFEST}", text.encode())
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CorruptArtifactError, match="manifest cannot be read"):
        storage.fetch("x", tmp_path / "deep" / "fetched", "thing")
    assert sorted(tmp_path.iterdir()) in (before, sorted([*before, tmp_path / "deep"]))


def test_upload_fails_if_the_store_keeps_other_contents(storage: FaultyStorage, folder: Path):
    """Every write is read back; a store that always garbles it is reported."""
    fs, _ = storage.filesystem()

    def garble(put: Callable[..., None], source: str, target: str) -> None:
        put(source, target)
        fs.pipe_file(target, fs.cat_file(target)[:-1] + b"?")

    with pytest.raises(StorageUnavailableError, match="returns other contents of"):
        replace(storage, put_file=garble).upload(folder, "x")
    assert storage.list_artifacts() == []


def test_upload_repeats_a_write_that_the_store_lost(storage: FaultyStorage, folder: Path):
    """A file that is absent when it is read back is written again; a store that always loses it is reported."""
    calls = []

    def lose_first(put: Callable[..., None], source: str, target: str) -> None:
        calls.append(target)
        if len(calls) > 1:
            put(source, target)

    replace(storage, put_file=lose_first).upload(folder, "x")
    assert storage.list_artifacts() == ["x"] and calls[0] == calls[1]
    with pytest.raises(StorageUnavailableError, match=r"does not have .*y/a\.bin, which was just written"):
        replace(storage, put_file=lambda *_: None).upload(folder, "y")


def test_corrupt_local_artifact_is_not_uploaded(storage: Storage, folder: Path):
    """The error names the local folder, and the store keeps its copy."""
    storage.upload(folder, "x")
    (folder / "b" / "c.txt").write_text("d")
    with pytest.raises(UserError, match=r"b/c\.txt is damaged") as caught:
        storage.upload(folder, "x")
    assert caught.value.where == str(folder) and caught.value.code == 5
    assert storage.list_artifacts() == ["x"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_local_disk_errors_are_reported_without_retries(
    storage: FaultyStorage, folder: Path, tmp_path: Path, number: int
):
    """The error names the local folder and does not call the stored artifact damaged."""
    storage.upload(folder, "x")
    calls = []

    def refuse(get: Callable[..., None], source: str, target: str) -> None:
        calls.append(target)
        raise OSError(number, os.strerror(number), target if number == errno.EACCES else None)

    with pytest.raises(LocalDiskError, match="node cannot write what it downloads") as caught:
        replace(storage, get_file=refuse).fetch("x", tmp_path / "fetched", "thing")
    assert str(tmp_path) in caught.value.where and caught.value.code == 3 and len(calls) == 1
    assert "Free some space or fix the permissions there" in caught.value.fix


def test_cache_folder_that_cannot_be_created_is_reported(storage: Storage, folder: Path, cache_dir: Path):
    """The error names it before anything is downloaded."""
    cache_dir.touch()
    with pytest.raises(LocalDiskError, match="node cannot write what it downloads") as caught:
        StoredArtifact.upload(folder, storage).fetch()
    assert str(cache_dir) in caught.value.where


@pytest.mark.parametrize("url", ["memory://store[1]", "file:///tmp/a*", "s3://bucket/what?"])
def test_url_with_glob_characters_is_rejected(url: str):
    """Stores would expand it, and delete other folders."""
    for method in (Storage.check, Storage.list_artifacts, Storage.clear):
        with pytest.raises(StorageUnavailableError, match="must have none of") as caught:
            method(Storage(url))
        assert caught.value.where == f"cluster.storage: {url}" and caught.value.code == 2
        assert caught.value.fix == "Use a URL without them."


def test_failed_requests_are_retried(storage: FaultyStorage, folder: Path):
    """An upload succeeds although two of three writes fail."""
    calls = []

    def fail_first(put: Callable[..., None], source: str, target: str) -> None:
        calls.append(target)
        if len(calls) % 3:
            raise ConnectionError("reset by peer")
        put(source, target)

    replace(storage, put_file=fail_first).upload(folder, "x")
    assert storage.list_artifacts() == ["x"]


def test_check_rejects_a_storage_that_cannot_be_written_to(tmp_path: Path):
    """The error has the URL and the fix."""
    (tmp_path / "file").touch()
    for url, what, fix in (
        (f"file://{tmp_path}/file/within", "The storage does not work: ", "Fix the URL, the store, or the keys"),
        ("nosuch://bucket", "The storage cannot be opened: ", "pip install -c constraints.txt -e '.[s3]'"),
    ):
        with pytest.raises(StorageUnavailableError, match=what) as caught:
            Storage(url).check()
        assert caught.value.where == f"cluster.storage: {url}" and fix in caught.value.fix and caught.value.code == 3


def test_input_is_uploaded_and_downloaded_once(storage: Storage, folder: Path, cache_dir: Path):
    """A second fetch on the same node needs no storage."""
    first, second = StoredArtifact.upload(folder, storage), StoredArtifact.upload(folder, storage)
    assert first == second and first.digest == artifact.read(folder, "thing").digest
    assert (first.fetch() / "a.bin").read_bytes() == (folder / "a.bin").read_bytes()
    storage.child("inputs").delete(first.digest)
    assert artifact.read(first.fetch(), "thing").digest == first.digest


@pytest.mark.parametrize("change", [lambda path: path.unlink(), lambda path: path.write_bytes(b"cut")])
def test_incomplete_cached_input_is_downloaded_again(
    storage: Storage, folder: Path, cache_dir: Path, change: Callable[[Path], object]
):
    """A deleted and a truncated file are replaced."""
    stored = StoredArtifact.upload(folder, storage)
    change(stored.fetch() / "a.bin")
    assert (stored.fetch() / "a.bin").read_bytes() == (folder / "a.bin").read_bytes()


def test_stored_input_with_another_digest_is_rejected(
    storage: Storage, folder: Path, other_folder: Path, cache_dir: Path
):
    """The error has both digests and the URL."""
    stored = StoredArtifact.upload(folder, storage)
    storage.child("inputs").upload(other_folder, stored.digest)
    other = artifact.read(other_folder, "thing").digest
    message = rf"The digest of this thing must be {stored.digest[:12]}, got {other[:12]}\."
    with pytest.raises(CorruptArtifactError, match=message) as caught:
        stored.fetch()
    assert caught.value.where == f"{storage.url}/inputs/{stored.digest}" and "Delete it there" in caught.value.fix


def test_two_jobs_may_upload_the_same_artifact_at_once(storage: FaultyStorage, folder: Path, tmp_path: Path):
    """A whole upload by another job, in the middle of this one, leaves a complete artifact for both."""
    uploaded = []

    def put_then_upload(put: Callable[..., None], source: str, target: str) -> None:
        uploaded.append(target)
        put(source, target)
        storage.upload(folder, "x")  # by the other job
        assert storage.fetch("x", tmp_path / "fetched-by-other", "thing")

    replace(storage, put_file=put_then_upload).upload(folder, "x")
    assert len(uploaded) == 1  # the other job uploaded the rest
    assert storage.fetch("x", tmp_path / "fetched", "thing").digest == artifact.read(folder, "thing").digest


def test_interrupted_replacement_leaves_no_mixed_artifact(
    storage: FaultyStorage, folder: Path, other_folder: Path, tmp_path: Path
):
    """The old manifest is removed before the first new file is written."""
    storage.upload(folder, "x")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace(storage, put_file=interrupt).upload(other_folder, "x")
    assert not storage.exists("x")
    storage.upload(other_folder, "x")
    assert storage.fetch("x", tmp_path / "fetched", "thing").digest == artifact.read(other_folder, "thing").digest


def state_of(step: int) -> TrainState:
    return TrainState(step, {"weight": torch.full((4,), float(step))}, [])


@pytest.fixture
def checkpoints(storage: Storage, tmp_path: Path) -> Checkpoints:
    """Checkpoints of steps 5, 10 and 15 on one node, of which the newest two remain."""
    checkpoints = Checkpoints(tmp_path / "one", "print", keep=2, storage=storage)
    for step in (5, 10, 15):
        checkpoints.save(state_of(step))
    checkpoints.wait()
    return checkpoints


def on_another_node(
    storage: Storage, tmp_path: Path, notify: Callable[[str], None] = lambda message: None
) -> Checkpoints:
    return Checkpoints(tmp_path / "two", "print", keep=2, notify=notify, storage=storage)


def test_another_node_fetches_the_newest_checkpoint(checkpoints: Checkpoints, storage: Storage, tmp_path: Path):
    """Older checkpoints are removed from the store as well."""
    other_node = on_another_node(storage, tmp_path)
    assert storage.list_artifacts() == ["step-000000010", "step-000000015"]
    assert other_node.fetch() == 15
    latest = other_node.latest()
    assert latest is not None and latest.step == 15 and torch.equal(latest.tensors["weight"], torch.full((4,), 15.0))


@pytest.mark.parametrize("file", [MANIFEST, "state.safetensors", "history.json"])
def test_checkpoint_damaged_in_the_store_falls_back_to_the_previous_one(
    checkpoints: Checkpoints, storage: Storage, tmp_path: Path, file: str
):
    """Messages report the loss, and the damaged checkpoint no longer counts."""
    messages: list[str] = []
    damage(storage, f"step-000000015/{file}", 2)
    assert on_another_node(storage, tmp_path, messages.append).fetch() == 10
    assert "damaged in the storage" in messages[0] and "5 steps are lost" in messages[1]
    assert storage.list_artifacts() == ["step-000000010"]


def test_faulty_reader_destroys_no_checkpoint(checkpoints: Checkpoints, storage: FaultyStorage, tmp_path: Path):
    """A reader whose downloads are all damaged renames manifests, and every byte stays for other readers."""

    def garble(get: Callable[..., None], source: str, target: str) -> None:
        get(source, target)
        Path(target).write_bytes(b"?")

    fs, root = storage.filesystem()
    before = {path: fs.cat_file(path) for path in fs.find(root)}
    assert on_another_node(replace(storage, get_file=garble), tmp_path).fetch() == 0
    assert storage.list_artifacts() == []
    renamed = {path.removesuffix(".damaged"): fs.cat_file(path) for path in fs.find(root)}
    assert renamed == before
    for path in fs.find(root):
        if path.endswith(".damaged"):
            fs.pipe_file(path.removesuffix(".damaged"), fs.cat_file(path))
    assert on_another_node(storage, tmp_path).fetch() == 15


def test_incompletely_uploaded_checkpoint_is_absent(checkpoints: Checkpoints, storage: Storage):
    """The previous one is the newest, and a rank removes a checkpoint that only its own node has."""
    fs, root = storage.filesystem()
    fs.rm_file(f"{root}/step-000000015/{MANIFEST}")
    assert checkpoints.fetch() == 10
    checkpoints.remove_except(10)
    latest = checkpoints.latest()
    assert latest is not None and latest.step == 10


def test_run_started_without_a_storage_continues_with_one(storage: Storage, tmp_path: Path):
    """The newest checkpoint is uploaded, then downloaded elsewhere."""
    local_only = Checkpoints(tmp_path / "local-only", "print", keep=2)
    local_only.save(state_of(5))
    local_only.wait()
    Checkpoints(tmp_path / "local-only", "print", keep=2, storage=storage).sync()
    assert storage.list_artifacts() == ["step-000000005"]
    Checkpoints(tmp_path / "elsewhere", "print", keep=2, storage=storage).sync()
    latest = Checkpoints(tmp_path / "elsewhere", "print", keep=2).latest()
    assert latest is not None and latest.step == 5


def test_sync_keeps_no_more_local_checkpoints_than_configured(
    checkpoints: Checkpoints, storage: Storage, tmp_path: Path
):
    """A downloaded checkpoint replaces an older local one."""
    local_only = Checkpoints(tmp_path / "local-only", "print", keep=1)
    local_only.save(state_of(5))
    local_only.wait()
    Checkpoints(tmp_path / "local-only", "print", keep=1, storage=storage).sync()
    assert [path.name for path in (tmp_path / "local-only").iterdir()] == ["step-000000015"]


def test_storage_is_checked_once_before_training(storage: Storage, tmp_path: Path, monkeypatch):
    """A failure after training is retried instead; a checkpoint of another network is rejected."""
    context = StageContext("vqvae", "print", tmp_path / "work", ClusterConfig(storage=storage.url))
    checked: list[Storage] = []
    monkeypatch.setattr(Storage, "check", lambda self: checked.append(self))

    def save_last_step(train_worker: object, arguments: object, *, context: StageContext) -> None:
        assert len(checked) == 1
        on_worker = Checkpoints(tmp_path / "node", "print", keep=1, storage=context.storage)
        on_worker.save(TrainState(4, {"network.weight": torch.ones(2, 1)}, []))
        on_worker.wait()

    config, network = TrainConfig(steps=4, batch_size=1), torch.nn.Linear(1, 2, bias=False)
    with without_ray(fit=save_last_step):
        ray_train.train_or_load(lambda: None, {}, config, network=network, context=context)
    assert torch.equal(network.weight, torch.ones(2, 1)) and len(checked) == 1

    with (
        without_ray(fit=save_last_step),
        pytest.raises(UserError, match="checkpoint of step 4 does not match this network: its weights have") as caught,
    ):
        ray_train.train_or_load(lambda: None, {}, config, network=torch.nn.Linear(3, 3), context=context)
    assert caught.value.where == f"{storage.url}/runs/vqvae/print/step-000000004" and caught.value.code == 5
    assert caught.value.fix.startswith("Remove it there, and from runs/ where the command runs, then run the same")


def test_unavailable_store_stops_the_run_and_keeps_its_checkpoints(
    checkpoints: Checkpoints, storage: FaultyStorage, tmp_path: Path
):
    """No checkpoint counts as damaged because the store does not answer."""

    def disconnect(*_: object) -> None:
        raise ConnectionError("no route to host")

    disconnected = replace(storage, put_file=disconnect, get_file=disconnect)
    saving = Checkpoints(checkpoints.folder, "print", keep=2, storage=disconnected)
    saving.save(state_of(20))
    with pytest.raises(UserError, match="no route to host") as caught:
        saving.wait()
    assert caught.value.code == 3 and storage.url in caught.value.where
    with pytest.raises(StorageUnavailableError):
        on_another_node(disconnected, tmp_path).fetch()
    assert on_another_node(storage, tmp_path).fetch() == 15


@pytest.fixture(scope="module")
def s3(tmp_path_factory) -> Iterator[Storage]:
    """A bucket of an S3 server on this machine."""
    pytest.importorskip("s3fs")
    log = tmp_path_factory.mktemp("s3") / "log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"], stdout=output, stderr=output
        )
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    try:
        with pytest.MonkeyPatch.context() as patch:
            address = _address(log)
            for name, value in {**keys, "AWS_ENDPOINT_URL": address}.items():
                patch.setenv(name, value)
            fsspec.filesystem("s3").mkdir("bucket")
            yield Storage("s3://bucket/prefix")
    finally:
        server.terminate()
        server.wait()


def _address(log: Path) -> str:
    """Return the server's address from its log, once the server answers."""
    for _ in range(600):
        addresses = [word for word in log.read_text().split() if word.startswith("http://127.0.0.1")]
        if addresses:
            urlopen(addresses[0] + "/moto-api/").close()
            return addresses[0]
        time.sleep(0.1)
    raise AssertionError(log.read_text())


def test_s3_bucket_holds_checkpoints(s3: Storage, tmp_path: Path):
    """Endpoint and keys come from the usual variables; a bucket that does not exist is rejected."""
    s3.check()
    messages: list[str] = []
    checkpoints = Checkpoints(tmp_path / "one", "print", keep=2, storage=s3)
    for step in (5, 10, 15):
        checkpoints.save(state_of(step))
    checkpoints.wait()
    damage(s3, "step-000000015/state.safetensors")
    other_node = on_another_node(s3, tmp_path, messages.append)
    assert other_node.fetch() == 10 and "5 steps are lost" in messages[-1]
    latest = other_node.latest()
    assert latest is not None and torch.equal(latest.tensors["weight"], torch.full((4,), 10.0))
    with pytest.raises(StorageUnavailableError, match="does not work") as caught:
        Storage("s3://elsewhere/prefix").check()
    assert "s3://elsewhere" in caught.value.where
