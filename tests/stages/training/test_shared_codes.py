"""Tests of the arrays of codes that the ranks of a node share."""

import errno
import fcntl
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from stages.config import ClusterConfig
from stages.errors import UserError
from stages.formats.codes import Codes
from stages.runtime.context import StageContext
from stages.training import shared_codes
from stages.training.shared_codes import SharedCodes
from tests.screen import Screen
from tests.stages.formats.test_codes import CODES, FILE, LEVELS, make


@pytest.fixture
def codes(tmp_path: Path) -> Codes:
    return make(tmp_path / "codes")


@pytest.fixture
def context(tmp_path: Path, cache_dir: Path) -> StageContext:
    work = tmp_path / "work"
    work.mkdir()
    return StageContext("prior@top", "f", work, ClusterConfig(), Screen())


def made_at(folder: Path) -> int:
    return next(folder.rglob("manifest.json")).stat().st_mtime_ns


def equal(shared: SharedCodes) -> bool:
    rows = shared.split("train", list(LEVELS))
    return all(np.array_equal(rows.codes[level], grids) for level, grids in CODES.items())


def test_arrays_are_made_once_per_node(codes, context, cache_dir):
    """Ranks that start at once share one folder, and a later run finds it."""
    with ThreadPoolExecutor(4) as ranks:
        assert all(map(equal, ranks.map(lambda rank: SharedCodes(codes, context), range(4))))
    first = made_at(cache_dir)
    assert equal(SharedCodes(codes, context)) and made_at(cache_dir) == first
    assert [path.name for path in (cache_dir / "vqvae2/codes").glob("*/")] == [codes.artifact.digest]


@pytest.mark.timeout(60)
def test_a_rank_that_looked_too_early_does_not_wait_for_the_end_of_another(codes, context, monkeypatch):
    """The other one has made the arrays since then, and keeps its lock while it trains."""
    other = SharedCodes(codes, context)
    read, looks = shared_codes._read, []

    def look(*arguments):
        looks.append(1)
        return None if len(looks) == 1 else read(*arguments)

    monkeypatch.setattr(shared_codes, "_read", look)
    assert equal(SharedCodes(codes, context)) and equal(other) and len(looks) == 2


@pytest.mark.timeout(60)
def test_damaged_arrays_in_use_are_left_alone(codes, context, cache_dir, monkeypatch):
    """Another folder has them then; without another one, an error ends the wait."""
    other = SharedCodes(codes, context)
    assert equal(other)
    next(cache_dir.rglob("train-top.npy")).unlink()
    monkeypatch.setattr(shared_codes, "RETRY_S", (0, 0.001))
    third = SharedCodes(codes, context)
    assert equal(third) and made_at(context.work_dir)
    with pytest.raises(UserError, match="damaged, and another training uses them"):
        third._open(codes, cache_dir / "vqvae2/codes", True, context)


def test_locks_work_as_on_network_disks(codes, context, cache_dir, monkeypatch):
    """There flock is emulated by fcntl: a shared lock needs a file open for reading, an exclusive one for writing."""
    monkeypatch.setattr(shared_codes.fcntl, "flock", fcntl.lockf)
    assert equal(SharedCodes(codes, context)) and made_at(cache_dir)


def test_a_cache_folder_without_locks_is_not_used(codes, context, cache_dir, monkeypatch):
    """The arrays are then in the work folder of the rank."""
    flock = fcntl.flock

    def flock_in_work_folder(file, operation: int) -> None:
        if not Path(file.name).is_relative_to(context.work_dir):
            raise OSError(errno.ENOLCK, "No locks available")
        flock(file, operation)

    monkeypatch.setattr(shared_codes.fcntl, "flock", flock_in_work_folder)
    assert equal(SharedCodes(codes, context)) and made_at(context.work_dir)


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damaged_arrays_are_made_again(codes, context, cache_dir, damage: str):
    """Parquet stays the source: no damage of the cache reaches a network."""
    SharedCodes(codes, context)
    path = next(cache_dir.rglob("train-top.npy"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    if damage == "delete":
        path.unlink()
    else:
        path.write_bytes(data if damage == "flip" else data[:-1])
    assert equal(SharedCodes(codes, context))


def test_only_unused_arrays_of_other_codes_are_deleted(codes, context, cache_dir, tmp_path):
    """The cache does not grow with every VQ-VAE; a training that runs keeps its arrays."""
    others = make(tmp_path / "others", lambda path: shutil.copy(path, path.with_name("test-00000.parquet")))
    running, folder = SharedCodes(codes, context), cache_dir / "vqvae2/codes"
    SharedCodes(others, context)
    assert {path.name for path in folder.glob("*/")} == {codes.artifact.digest, others.artifact.digest}
    del running
    shutil.rmtree(folder / others.artifact.digest)
    SharedCodes(others, context)
    assert [path.name for path in folder.glob("*/")] == [others.artifact.digest]


def test_the_work_folder_is_used_if_the_cache_has_no_room(codes, context, cache_dir, monkeypatch):
    """The same if the home cannot be written to."""
    monkeypatch.setattr(shared_codes, "array_bytes", lambda codes: 1 << 60)
    assert equal(SharedCodes(codes, context))
    assert next(context.work_dir.rglob("train-top.npy")) and not list(cache_dir.rglob("train-top.npy"))
    assert ["GB of arrays" in message for message in context.reporter.messages] == [True]


def test_an_unwritable_cache_is_replaced_by_the_work_folder(codes, context, monkeypatch):
    """A container may have no home."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nobody")
    assert equal(SharedCodes(codes, context)) and list(context.work_dir.rglob("train-top.npy"))


def test_damaged_codes_are_reported(context, tmp_path):
    """A code out of range is found when the arrays are made; nothing is left."""
    from tests.stages.formats.test_codes import _grids, _top

    with pytest.raises(UserError, match="Codes of top must be below 8") as caught:
        SharedCodes(make(tmp_path / "bad", _top(_grids(9))), context)
    assert caught.value.where.endswith(FILE) and not list(tmp_path.rglob("train-top.npy"))
