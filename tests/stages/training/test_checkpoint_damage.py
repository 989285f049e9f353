"""Whatever is cut off or damaged, wherever: the newest intact checkpoint is found, and holds what was saved."""

import errno
import multiprocessing
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stages.errors import UserError
from stages.training.checkpoint import Checkpoints, State

FLIPS = 1000
CALLS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir", "os.fsync"}
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["pytest", "stages.training.checkpoint"])


def state(step: int) -> State:
    return State(step, {"weight": torch.full((40,), float(step))}, [{"step": step, "name": "train/x", "value": 0.5}])


def opened(folder: Path) -> Checkpoints:
    return Checkpoints(folder, "print", keep=2)


def save(folder: Path, step: int) -> None:
    checkpoints = opened(folder)
    checkpoints.save(state(step))
    checkpoints.wait()


def read(folder: Path) -> int:
    """Return the step of the newest checkpoint, after seeing that it is what was saved."""
    found = opened(folder).latest()
    assert found is not None
    expected = state(found.step)
    assert torch.equal(found.tensors["weight"], expected.tensors["weight"]) and found.history == expected.history
    return found.step


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Hold the checkpoints of steps 5 and 10."""
    for step in (5, 10):
        save(tmp_path / "kept", step)
    return tmp_path / "kept"


def test_a_thousand_bit_flips_are_all_found(folder: Path):
    """In weights, curves and manifest, one at a time: the checkpoint before is used each time."""
    newest, aside = folder / "step-000000010", folder / "step-000000010.damaged"
    files = sorted(newest.iterdir())
    intact = {path: path.read_bytes() for path in files}
    bits = [(path, bit) for path in files for bit in range(8 * len(intact[path]))]
    for path, bit in random.Random(0).sample(bits, FLIPS):
        flipped = bytearray(intact[path])
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert read(folder) == 5, f"bit {bit} of {path.name}"
        aside.rename(newest)
        path.write_bytes(intact[path])
    assert read(folder) == 10


def kill(call: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail(call: int) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def disturbed(folder: Path, at: int, how: Callable[[int], None], step: int) -> None:
    """Save a step, or with step 0 read the newest; before the system call of number `at` comes what is to come."""
    calls = 0

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal calls
        path = str(arguments[0])  # within a folder that is being removed: a name or a descriptor
        if event in CALLS and (path.startswith(str(folder)) or not path.startswith("/")):
            calls += 1
            if calls == at:
                how(calls)

    real = os.fsync

    def fsync(file: int) -> None:
        count("os.fsync", (file,))
        real(file)

    os.fsync = fsync
    sys.addaudithook(count)
    try:
        save(folder, step) if step else opened(folder).latest()
    except UserError as error:
        assert "Input/output error" in error.what
    os._exit(0 if calls < at else 1)


@pytest.mark.parametrize("how", [kill, fail])
def test_a_commit_cut_off_anywhere_leaves_the_old_or_the_new_state(folder: Path, tmp_path: Path, how):
    """Before each system call in turn: the newest whole one is found, the same step can be saved, nothing is left."""
    found = []
    for at in range(1, 200):
        work = tmp_path / f"{how.__name__}-{at}"
        shutil.copytree(folder, work)
        if _disturb(work, at, how, 15) == 0:
            break
        found.append(read(work))
        save(work, 15)
        assert read(work) == 15
        assert sorted(path.name for path in work.iterdir()) == ["step-000000010", "step-000000015"]
    assert len(found) > 20 and found == sorted(found) and set(found) == {10, 15}


def test_setting_a_damaged_checkpoint_aside_may_be_cut_off_anywhere(folder: Path, tmp_path: Path):
    """With one of an earlier time in the way: the checkpoint before is found each time."""
    (folder / "step-000000010.damaged" / "deeper").mkdir(parents=True)
    (folder / "step-000000010" / "state.safetensors").write_bytes(b"x")
    for at in range(1, 200):
        work = tmp_path / str(at)
        shutil.copytree(folder, work)
        ended = _disturb(work, at, kill, 0)
        assert read(work) == 5
        if ended == 0:
            break
    assert at > 10


def _disturb(work: Path, at: int, how: Callable[[int], None], step: int) -> int:
    process = processes.Process(target=disturbed, args=(work, at, how, step))
    process.start()
    process.join(60)
    assert process.exitcode in (0, 1, -signal.SIGKILL)
    return process.exitcode
