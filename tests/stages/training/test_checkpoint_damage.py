"""After any damage or interruption the newest intact checkpoint is read, and equals what was saved."""

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
from stages.training.checkpoint import Checkpoints
from stages.training.checkpoint_state import TrainState

FLIPPED_BITS = 1000
FILE_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir", "os.fsync"}
MAX_CALLS = 200  # more file system calls than saving or reading a checkpoint makes
COMPLETED, INTERRUPTED = 0, 1  # exit status of the process: whether it ended before the chosen call
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["pytest", "stages.training.checkpoint"])


def state_of(step: int) -> TrainState:
    history = [{"step": step, "name": "train/x", "value": 0.5}]
    return TrainState(step, {"weight": torch.full((40,), float(step))}, history)


def open_checkpoints(folder: Path) -> Checkpoints:
    return Checkpoints(folder, "print", keep=2)


def save(folder: Path, step: int) -> None:
    checkpoints = open_checkpoints(folder)
    checkpoints.save(state_of(step))
    checkpoints.wait()


def read_step(folder: Path) -> int:
    """Return the step of the newest checkpoint, after comparing it with what was saved."""
    latest = open_checkpoints(folder).latest()
    assert latest is not None
    expected = state_of(latest.step)
    assert torch.equal(latest.tensors["weight"], expected.tensors["weight"]) and latest.history == expected.history
    return latest.step


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the checkpoints of steps 5 and 10."""
    for step in (5, 10):
        save(tmp_path / "checkpoints", step)
    return tmp_path / "checkpoints"


def test_a_thousand_bit_flips_are_detected(folder: Path):
    """One bit at a time in weights, curves and manifest: the previous checkpoint is used each time."""
    newest, damaged = folder / "step-000000010", folder / "step-000000010.damaged"
    files = sorted(newest.iterdir())
    intact = {path: path.read_bytes() for path in files}
    bits = [(path, bit) for path in files for bit in range(8 * len(intact[path]))]
    for path, bit in random.Random(0).sample(bits, FLIPPED_BITS):
        flipped = bytearray(intact[path])
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert read_step(folder) == 5, f"bit {bit} of {path.name}"
        damaged.rename(newest)
        path.write_bytes(intact[path])
    assert read_step(folder) == 10


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def save_with_fault(folder: Path, call: int, fault: Callable[[], None], step: int) -> None:
    """Save a step, or read the newest if `step` is 0, with a fault before the file system call of number `call`.

    Runs in a process of its own and ends it, with status COMPLETED if there were fewer calls.
    """
    calls = 0

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal calls
        path = str(arguments[0])  # removing a folder calls with a relative name or a descriptor
        if event in FILE_EVENTS and (path.startswith(str(folder)) or not path.startswith("/")):
            calls += 1
            if calls == call:
                fault()

    real_fsync = os.fsync

    def fsync(file: int) -> None:  # raises no audit event of its own
        count("os.fsync", (file,))
        real_fsync(file)

    os.fsync = fsync
    sys.addaudithook(count)
    try:
        save(folder, step) if step else open_checkpoints(folder).latest()
    except UserError as error:
        assert "Input/output error" in error.what
    os._exit(COMPLETED if calls < call else INTERRUPTED)


def run_with_fault(folder: Path, call: int, fault: Callable[[], None], step: int) -> int:
    """Run `save_with_fault` in a process and return its exit status."""
    process = processes.Process(target=save_with_fault, args=(folder, call, fault, step))
    process.start()
    process.join(60)
    assert process.exitcode in (COMPLETED, INTERRUPTED, -signal.SIGKILL)
    return process.exitcode


@pytest.mark.parametrize("fault", [kill, fail])
def test_a_commit_interrupted_anywhere_leaves_the_old_or_the_new_state(folder: Path, tmp_path: Path, fault):
    """With a fault before each call in turn: the newest complete state is read, and the step can be saved again."""
    steps = []
    for call in range(1, MAX_CALLS):
        work = tmp_path / f"{fault.__name__}-{call}"
        shutil.copytree(folder, work)
        if run_with_fault(work, call, fault, 15) == COMPLETED:
            break
        steps.append(read_step(work))
        save(work, 15)
        assert read_step(work) == 15
        assert sorted(path.name for path in work.iterdir()) == ["step-000000010", "step-000000015"]
    assert len(steps) > 20 and steps == sorted(steps) and set(steps) == {10, 15}


def test_renaming_a_damaged_checkpoint_may_be_interrupted_anywhere(folder: Path, tmp_path: Path):
    """With an older step-*.damaged folder, and a kill before each call in turn: the previous checkpoint is read."""
    (folder / "step-000000010.damaged" / "deeper").mkdir(parents=True)
    (folder / "step-000000010" / "state.safetensors").write_bytes(b"x")
    for call in range(1, MAX_CALLS):
        work = tmp_path / str(call)
        shutil.copytree(folder, work)
        status = run_with_fault(work, call, kill, 0)
        assert read_step(work) == 5
        if status == COMPLETED:
            break
    assert call > 10
