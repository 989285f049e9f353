"""A store is not believed: what it damages, loses or refuses is noticed, on the way in and on the way out."""

import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import fsspec
import pytest
import torch

from stages.config import ClusterConfig, TrainConfig
from stages.errors import UserError
from stages.formats import artifact
from stages.formats.artifact import MANIFEST
from stages.runtime import storage as storage_module
from stages.runtime.context import StageContext
from stages.runtime.storage import Damaged, Storage, Stored, Unreachable, Unwritable
from stages.training import ray_train
from stages.training.checkpoint import Checkpoints, State


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    """Tests do not wait for a store to get better."""
    monkeypatch.setattr(storage_module, "FIRST_RETRY_DELAY_S", 0.0)


@pytest.fixture(params=["file", "memory"])
def storage(request, tmp_path: Path) -> Iterator[Storage]:
    """An empty storage, on a disk or in memory."""
    yield Storage(f"file://{tmp_path}/store" if request.param == "file" else "memory://store")
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An artifact of three files, one of them within a folder."""
    with artifact.commit_folder(tmp_path / "made", "thing", {"step": 3}) as made:
        (made / "a.bin").write_bytes(bytes(range(256)) * 40)
        (made / "b").mkdir()
        (made / "b" / "c.txt").write_text("c")
        (made / "empty").touch()
    return tmp_path / "made"


def damage(storage: Storage, name: str, place: int = 5) -> None:
    """Flip a bit of a file in the store."""
    files, root = storage.opened()
    data = bytearray(files.cat_file(f"{root}/{name}"))
    data[place % len(data)] ^= 1
    files.pipe_file(f"{root}/{name}", bytes(data))


def test_a_folder_comes_back_as_it_went(storage: Storage, folder: Path, tmp_path: Path):
    """Every byte, and the digest with them."""
    storage.upload(folder, "x")
    assert storage.names() == ["x"] and storage.holds("x") and not storage.holds("y")
    found = storage.fetch("x", tmp_path / "back", "thing")
    assert found.digest == artifact.read(folder, "thing").digest
    assert (tmp_path / "back" / "b" / "c.txt").read_text() == "c"


def test_a_folder_without_a_manifest_is_not_there(storage: Storage, folder: Path):
    """The manifest goes up last, and is taken away first."""
    storage.upload(folder, "x")
    files, root = storage.opened()
    files.rm_file(f"{root}/x/{MANIFEST}")
    assert storage.names() == []
    storage.upload(folder, "x")
    storage.discard("x")
    assert storage.names() == [] and not files.exists(f"{root}/x/a.bin")
    storage.upload(folder, "x")
    for _ in range(2):
        storage.clear()
        assert storage.names() == []


@pytest.mark.parametrize("name", ["a.bin", "b/c.txt", MANIFEST])
def test_what_the_store_damages_is_never_taken(storage: Storage, folder: Path, tmp_path: Path, name: str):
    """Nothing stands where the folder was to be, not even a part of it."""
    storage.upload(folder, "x")
    for place in range(0, 120, 13):
        damage(storage, f"x/{name}", place)
        if name == MANIFEST:  # it has no hash of its own here; what it says of the files and itself has to hold
            with pytest.raises((Damaged, AssertionError)):
                assert storage.fetch("x", tmp_path / "back", "thing").digest == artifact.read(folder, "thing").digest
        else:
            with pytest.raises(Damaged, match=r"damaged|holds") as caught:
                storage.fetch("x", tmp_path / "back", "thing")
            assert (caught.value.where, caught.value.code) == (f"{storage.url}/x", 5)
            assert caught.value.fix == "Delete it there, then run the same command again."
            assert not (tmp_path / "back").exists()
        damage(storage, f"x/{name}", place)


def test_a_missing_file_is_named(storage: Storage, folder: Path, tmp_path: Path):
    """As damaged as a file with other contents."""
    storage.upload(folder, "x")
    files, root = storage.opened()
    files.rm_file(f"{root}/x/a.bin")
    with pytest.raises(Damaged, match=r"a\.bin is missing"):
        storage.fetch("x", tmp_path / "back", "thing")


def test_a_manifest_that_leads_out_of_its_folder_is_refused(storage: Storage, folder: Path, tmp_path: Path):
    """Nothing is written beside the folder that was asked for."""
    text = (folder / MANIFEST).read_text().replace('"a.bin"', '"../../a.bin"')
    storage.upload(folder, "x")
    files, root = storage.opened()
    files.pipe_file(f"{root}/x/{MANIFEST}", text.encode())
    before = sorted(tmp_path.iterdir())
    with pytest.raises(Damaged, match="manifest cannot be read"):
        storage.fetch("x", tmp_path / "deep" / "back", "thing")
    assert sorted(tmp_path.iterdir()) in (before, sorted([*before, tmp_path / "deep"]))


def test_a_store_that_says_success_and_keeps_garbage_is_found_out(storage: Storage, folder: Path, monkeypatch):
    """A write counts once it has been read back; here it never can."""
    files, _ = storage.opened()
    put = files.put_file

    def garbles(source: str, target: str, **options: object) -> None:
        put(source, target, **options)
        files.pipe_file(target, files.cat_file(target)[:-1] + b"?")

    monkeypatch.setattr(files, "put_file", garbles)
    with pytest.raises(Unreachable, match="keeps something else"):
        storage.upload(folder, "x")
    assert storage.names() == []


def test_a_store_that_says_success_and_keeps_nothing_is_asked_again(storage: Storage, folder: Path, monkeypatch):
    """A file that is not there when it is read back is a bad moment, and in the end the store's fault."""
    files, _ = storage.opened()
    put, calls = files.put_file, []

    def loses_first(source: str, target: str, **options: object) -> None:
        calls.append(target)
        if len(calls) > 1:
            put(source, target, **options)

    monkeypatch.setattr(files, "put_file", loses_first)
    storage.upload(folder, "x")
    assert storage.names() == ["x"] and calls[0] == calls[1]
    monkeypatch.setattr(files, "put_file", lambda source, target, **options: None)
    with pytest.raises(Unreachable, match=r"does not have .*y/a\.bin, which was written just now"):
        storage.upload(folder, "y")


def test_what_has_rotted_here_is_not_put_there(storage: Storage, folder: Path):
    """The folder here is named, not the store, which keeps what it had."""
    storage.upload(folder, "x")
    (folder / "b" / "c.txt").write_text("d")
    with pytest.raises(UserError, match=r"b/c\.txt is damaged") as error:
        storage.upload(folder, "x")
    assert error.value.where == str(folder) and error.value.code == 5
    assert storage.names() == ["x"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_disk_here_that_takes_nothing_is_named_at_once(
    storage: Storage, folder: Path, tmp_path: Path, monkeypatch, number: int
):
    """Waiting for the store would not help, and what lies there is not damaged."""
    storage.upload(folder, "x")
    files, _ = storage.opened()
    calls = []

    def refuses(source: str, target: str, **options: object) -> None:
        calls.append(target)
        raise OSError(number, os.strerror(number), target if number == errno.EACCES else None)

    monkeypatch.setattr(files, "get_file", refuses)
    with pytest.raises(Unwritable, match="cannot be kept on this node") as error:
        storage.fetch("x", tmp_path / "back", "thing")
    assert str(tmp_path) in error.value.where and error.value.code == 3 and len(calls) == 1
    assert "Free some space or mend the permissions there" in error.value.fix


def test_a_cache_folder_that_cannot_be_made_is_named(storage: Storage, folder: Path, tmp_path: Path, monkeypatch):
    """Before anything is fetched."""
    (tmp_path / "cache").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(Unwritable, match="cannot be kept on this node") as error:
        Stored.upload(folder, storage).fetch()
    assert str(tmp_path / "cache") in error.value.where


@pytest.mark.parametrize("url", ["memory://store[1]", "file:///tmp/a*", "s3://bucket/what?"])
def test_a_url_that_is_a_pattern_is_refused(url: str):
    """It would find nothing of its own, and remove what is another's."""
    for act in (Storage.check, Storage.names, Storage.clear):
        with pytest.raises(Unreachable, match="take for patterns") as error:
            act(Storage(url))
        assert error.value.where == f"cluster.storage: {url}" and error.value.code == 2
        assert error.value.fix == "Use a URL without them."


def test_bad_moments_pass(storage: Storage, folder: Path, monkeypatch):
    """A store that fails now and then is asked again."""
    files, _ = storage.opened()
    put, calls = files.put_file, []

    def fails_first(source: str, target: str, **options: object) -> None:
        calls.append(target)
        if len(calls) % 3:
            raise ConnectionError("reset by peer")
        put(source, target, **options)

    monkeypatch.setattr(files, "put_file", fails_first)
    storage.upload(folder, "x")
    assert storage.names() == ["x"]


def test_a_storage_that_cannot_be_written_is_refused_at_once(tmp_path: Path):
    """Before hours of work, with the place and the fix."""
    (tmp_path / "file").touch()
    for url, what, fix in (
        (f"file://{tmp_path}/file/within", "The storage does not work: ", "Mend the URL, the store, or the keys"),
        ("nosuch://bucket", "There is no way to reach this storage: ", "pip install 'vqvae2[s3]'"),
    ):
        with pytest.raises(Unreachable, match=what) as error:
            Storage(url).check()
        assert error.value.where == f"cluster.storage: {url}" and fix in error.value.fix and error.value.code == 3


def test_an_input_goes_up_once_and_comes_down_once(storage: Storage, folder: Path, tmp_path: Path, monkeypatch):
    """It lies under its digest, for every run and every worker of a node."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first, second = Stored.upload(folder, storage), Stored.upload(folder, storage)
    assert first == second and first.digest == artifact.read(folder, "thing").digest
    assert (first.fetch() / "a.bin").read_bytes() == (folder / "a.bin").read_bytes()
    storage.under("inputs").discard(first.digest)
    assert artifact.read(first.fetch(), "thing").digest == first.digest


@pytest.mark.parametrize("change", [lambda path: path.unlink(), lambda path: path.write_bytes(b"cut")])
def test_an_input_that_was_tidied_away_is_fetched_again(
    storage: Storage, folder: Path, tmp_path: Path, monkeypatch, change
):
    """Caches are cleared by age, and power fails: what is not whole here costs another way from the store."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    stored = Stored.upload(folder, storage)
    change(stored.fetch() / "a.bin")
    assert (stored.fetch() / "a.bin").read_bytes() == (folder / "a.bin").read_bytes()


def test_an_input_that_is_another_in_the_store_is_refused(storage: Storage, folder: Path, tmp_path: Path, monkeypatch):
    """Its digest is its name; the letter says where it lies."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    stored = Stored.upload(folder, storage)
    with artifact.commit_folder(tmp_path / "other", "thing", {}) as made:
        (made / "a.bin").touch()
    storage.under("inputs").upload(tmp_path / "other", stored.digest)
    with pytest.raises(Damaged, match=rf"This is thing \w+, not {stored.digest[:12]}\.") as caught:
        stored.fetch()
    assert caught.value.where == f"{storage.url}/inputs/{stored.digest}" and "Delete it there" in caught.value.fix


def test_two_jobs_may_bring_the_same_input_at_a_time(storage: Storage, folder: Path, tmp_path: Path, monkeypatch):
    """Neither takes away what the other has put there, at any file of the other's upload."""
    put, files_put = storage_module._put, []

    def interrupted(files, source, target, sha256):
        files_put.append(target)
        put(files, source, target, sha256)
        monkeypatch.setattr(storage_module, "_put", put)
        storage.upload(folder, "x")  # the other job, from its beginning to its end
        assert storage.fetch("x", tmp_path / "theirs", "thing")
        monkeypatch.setattr(storage_module, "_put", interrupted)

    monkeypatch.setattr(storage_module, "_put", interrupted)
    storage.upload(folder, "x")
    assert len(files_put) == 1  # the other has put the rest
    assert storage.fetch("x", tmp_path / "ours", "thing").digest == artifact.read(folder, "thing").digest


def test_another_folder_under_the_same_name_is_never_half_of_each(
    storage: Storage, folder: Path, tmp_path: Path, monkeypatch
):
    """Its manifest goes before its files come."""
    storage.upload(folder, "x")
    with artifact.commit_folder(tmp_path / "other", "thing", {}) as made:
        (made / "a.bin").write_bytes(b"other")
    with monkeypatch.context() as patch:
        patch.setattr(storage_module, "_put", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            storage.upload(tmp_path / "other", "x")
    assert not storage.holds("x")
    storage.upload(tmp_path / "other", "x")
    assert storage.fetch("x", tmp_path / "back", "thing").digest == artifact.read(tmp_path / "other", "thing").digest


def state(step: int) -> State:
    return State(step, {"weight": torch.full((4,), float(step))}, [])


@pytest.fixture
def kept(storage: Storage, tmp_path: Path) -> Checkpoints:
    """Three checkpoints saved on one node, of which two are kept."""
    checkpoints = Checkpoints(tmp_path / "one", "print", keep=2, storage=storage)
    for step in (5, 10, 15):
        checkpoints.save(state(step))
    checkpoints.wait()
    return checkpoints


def elsewhere(kept: Checkpoints, tmp_path: Path, notes: list[str]) -> Checkpoints:
    return Checkpoints(tmp_path / "two", "print", keep=2, note=notes.append, storage=kept.storage)


def test_another_node_goes_on_from_the_newest_checkpoint(kept: Checkpoints, storage: Storage, tmp_path: Path):
    """Which it finds by looking; older ones have gone from the store, too."""
    other = elsewhere(kept, tmp_path, [])
    assert storage.names() == ["step-000000010", "step-000000015"]
    assert other.fetch() == 15
    found = other.latest()
    assert found is not None and found.step == 15 and torch.equal(found.tensors["weight"], torch.full((4,), 15.0))


@pytest.mark.parametrize("file", [MANIFEST, "state.safetensors", "history.json"])
def test_a_checkpoint_damaged_in_the_store_falls_back_to_the_one_before(
    kept: Checkpoints, storage: Storage, tmp_path: Path, file: str
):
    """The loss is told, and what is damaged no longer counts among those that are kept."""
    notes: list[str] = []
    damage(storage, f"step-000000015/{file}", 2)
    assert elsewhere(kept, tmp_path, notes).fetch() == 10
    assert "damaged in the storage" in notes[0] and "5 steps are lost" in notes[1]
    assert storage.names() == ["step-000000010"]


def test_a_reader_who_takes_all_for_damaged_destroys_nothing(
    kept: Checkpoints, storage: Storage, tmp_path: Path, monkeypatch
):
    """The fault may be in its memory or on its way: every byte is still there for another."""
    files, root = storage.opened()
    before = {path: files.cat_file(path) for path in files.find(root)}
    with monkeypatch.context() as patch:
        patch.setattr(artifact, "sha256", lambda path: "0" * 64)
        assert elsewhere(kept, tmp_path, []).fetch() == 0
    assert storage.names() == []
    renamed = {path.removesuffix(".damaged"): files.cat_file(path) for path in files.find(root)}
    assert renamed == before
    for path in files.find(root):
        if path.endswith(".damaged"):
            files.pipe_file(path.removesuffix(".damaged"), files.cat_file(path))
    assert elsewhere(kept, tmp_path, []).fetch() == 15


def test_a_checkpoint_that_never_arrived_whole_is_not_there(kept: Checkpoints, storage: Storage, tmp_path: Path):
    """The one before it is the newest; a worker forgets what only its own node has."""
    files, root = storage.opened()
    files.rm_file(f"{root}/step-000000015/{MANIFEST}")
    assert kept.fetch() == 10
    kept.forget_all_but(10)
    found = kept.latest()
    assert found is not None and found.step == 10


def test_a_run_begun_without_a_storage_goes_on_with_one(storage: Storage, tmp_path: Path):
    """The newest checkpoint is brought to wherever it is not."""
    alone = Checkpoints(tmp_path / "alone", "print", keep=2)
    alone.save(state(5))
    alone.wait()
    Checkpoints(tmp_path / "alone", "print", keep=2, storage=storage).exchange()
    assert storage.names() == ["step-000000005"]
    Checkpoints(tmp_path / "other", "print", keep=2, storage=storage).exchange()
    found = Checkpoints(tmp_path / "other", "print", keep=2).latest()
    assert found is not None and found.step == 5


def test_what_comes_home_is_no_more_than_is_kept(kept: Checkpoints, storage: Storage, tmp_path: Path):
    """Old checkpoints here go when a newer one arrives."""
    home = Checkpoints(tmp_path / "home", "print", keep=1)
    home.save(state(5))
    home.wait()
    Checkpoints(tmp_path / "home", "print", keep=1, storage=storage).exchange()
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["step-000000015"]


def test_a_bad_moment_after_training_costs_no_result(storage: Storage, tmp_path: Path, monkeypatch):
    """The store is tried out once, at the beginning: later a failure is waited out, as everywhere."""
    context = StageContext("vqvae", "print", tmp_path / "work", ClusterConfig(storage=storage.url))
    probes: list[Storage] = []
    monkeypatch.setattr(Storage, "check", lambda self: probes.append(self))

    def trains(learn: object, arguments: object, *, context: StageContext) -> None:
        assert len(probes) == 1
        worker = Checkpoints(tmp_path / "node", "print", keep=1, storage=context.storage)
        worker.save(State(4, {"network.weight": torch.ones(2, 1)}, []))
        worker.wait()

    monkeypatch.setattr(ray_train, "fit", trains)
    config, network = TrainConfig(steps=4, batch_size=1), torch.nn.Linear(1, 2, bias=False)
    ray_train.trained(lambda: None, {}, config, network=network, context=context)
    assert torch.equal(network.weight, torch.ones(2, 1)) and len(probes) == 1

    with pytest.raises(UserError, match="checkpoint of step 4 is not of this network: its weights have") as caught:
        ray_train.trained(lambda: None, {}, config, network=torch.nn.Linear(3, 3), context=context)
    assert caught.value.where == f"{storage.url}/runs/vqvae/print/step-000000004" and caught.value.code == 5
    assert caught.value.fix.startswith("Remove it there, and from runs/ where the command is given, then run the same")


def test_a_store_that_is_away_stops_the_run_and_keeps_its_checkpoints(kept: Checkpoints, tmp_path: Path, monkeypatch):
    """No checkpoint is taken for damaged because a store does not answer."""
    assert kept.storage is not None
    files, _ = kept.storage.opened()

    def away(*arguments: object, **options: object) -> None:
        raise ConnectionError("no route to host")

    with monkeypatch.context() as patch:
        for method in ("put_file", "get_file"):
            patch.setattr(type(files), method, away)  # each thread has an instance of its own
        kept.save(state(20))
        with pytest.raises(UserError, match="no route to host") as error:
            kept.wait()
        assert error.value.code == 3 and kept.storage.url in error.value.where
        with pytest.raises(Unreachable):
            elsewhere(kept, tmp_path, []).fetch()
    assert elsewhere(kept, tmp_path, []).fetch() == 15


@pytest.fixture(scope="module")
def s3(tmp_path_factory) -> Iterator[Storage]:
    """A bucket of a server on this machine."""
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
    for _ in range(600):
        words = [word for word in log.read_text().split() if word.startswith("http://127.0.0.1")]
        if words:
            urlopen(words[0] + "/moto-api/").close()
            return words[0]
        time.sleep(0.1)
    raise AssertionError(log.read_text())


def test_an_s3_bucket_keeps_checkpoints_and_gives_them_back(s3: Storage, tmp_path: Path):
    """Endpoint and keys come from the usual variables; a bucket that is not there is refused with the fix."""
    s3.check()
    notes: list[str] = []
    checkpoints = Checkpoints(tmp_path / "one", "print", keep=2, storage=s3)
    for step in (5, 10, 15):
        checkpoints.save(state(step))
    checkpoints.wait()
    damage(s3, "step-000000015/state.safetensors")
    other = Checkpoints(tmp_path / "two", "print", keep=2, note=notes.append, storage=s3)
    assert other.fetch() == 10 and "5 steps are lost" in notes[-1]
    found = other.latest()
    assert found is not None and torch.equal(found.tensors["weight"], torch.full((4,), 10.0))
    with pytest.raises(Unreachable, match="does not work") as error:
        Storage("s3://elsewhere/prefix").check()
    assert "s3://elsewhere" in error.value.where
