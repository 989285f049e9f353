"""Checkpoints are whole, intact and this run's own, or they are not used."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stages.errors import UserError
from stages.formats.artifact import MANIFEST
from stages.training.checkpoint import Checkpoints, State
from tests.mounts import within


def state(step: int) -> State:
    return State(step, {"weight": torch.full((4,), float(step))}, [{"step": step, "name": "train/x", "value": 0.5}])


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def checkpoints(tmp_path: Path, notes: list[str]) -> Checkpoints:
    kept = Checkpoints(tmp_path, "print", keep=2, note=notes.append)
    for step in (5, 10):
        kept.save(state(step))
    kept.wait()
    return kept


def test_what_was_saved_last_is_read_back(checkpoints: Checkpoints):
    """Step, tensors and history return as they were."""
    found = checkpoints.latest()
    assert found is not None and found.step == 10 and found.history == state(10).history
    torch.testing.assert_close(found.tensors["weight"], torch.full((4,), 10.0), rtol=0, atol=0)


def test_only_the_newest_are_kept(checkpoints: Checkpoints, tmp_path: Path):
    """Older ones go once a newer one is whole."""
    checkpoints.save(state(15))
    checkpoints.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000010", "step-000000015"]


@pytest.mark.parametrize("byte", range(0, 400, 7))
def test_a_flipped_bit_falls_back_to_the_checkpoint_before(
    checkpoints: Checkpoints, tmp_path: Path, notes: list[str], byte: int
):
    """No damaged state is ever loaded, and the loss is told."""
    path = tmp_path / "step-000000010" / "state.safetensors"
    data = bytearray(path.read_bytes())
    data[byte % len(data)] ^= 1
    path.write_bytes(data)
    found = checkpoints.latest()
    assert found is not None and found.step == 5
    assert "5 steps are lost" in notes[-1]
    assert (tmp_path / "step-000000010.damaged").is_dir()


def test_a_flipped_bit_in_the_manifest_never_changes_what_is_read(
    checkpoints: Checkpoints, tmp_path: Path, notes: list[str]
):
    """Each byte in turn: the state is the one that was saved, or the one before is used."""
    folder, aside = tmp_path / "step-000000010", tmp_path / "step-000000010.damaged"
    intact = (folder / MANIFEST).read_bytes()
    for place in range(len(intact)):
        damaged = bytearray(intact)
        damaged[place] ^= 1 << (place % 8)
        (folder / MANIFEST).write_bytes(damaged)
        found = checkpoints.latest()
        assert found is not None and found.history == state(found.step).history
        assert found.step == (5 if aside.exists() else 10)
        if aside.exists():
            aside.rename(folder)
    assert len(notes) > len(intact)  # two for nearly every byte


def test_a_second_damaged_checkpoint_of_a_step_takes_the_place_of_the_first(checkpoints: Checkpoints, tmp_path: Path):
    """What is set aside never stands in the way of going on."""
    for _ in range(2):
        (tmp_path / "step-000000010" / "state.safetensors").write_bytes(b"x")
        found = checkpoints.latest()
        assert found is not None and found.step == 5
        checkpoints.save(state(10))
        checkpoints.wait()


@pytest.mark.parametrize("name", [MANIFEST, "state.safetensors", "history.json"])
def test_a_missing_file_falls_back_to_the_checkpoint_before(checkpoints: Checkpoints, tmp_path: Path, name: str):
    """A checkpoint is whole or absent."""
    (tmp_path / "step-000000010" / name).unlink()
    found = checkpoints.latest()
    assert found is not None and found.step == 5


def test_a_checkpoint_of_other_settings_is_not_used(checkpoints: Checkpoints, tmp_path: Path):
    """The fingerprint decides, not the folder."""
    with pytest.raises(UserError, match="No checkpoint is intact"):
        Checkpoints(tmp_path, "another", keep=2).latest()


def test_where_no_checkpoint_is_intact_training_does_not_begin_anew_unasked(checkpoints: Checkpoints, tmp_path: Path):
    """It says what is lost and waits to be asked again; what was put in place meanwhile is used."""
    intact = (tmp_path / "step-000000005" / "state.safetensors").read_bytes()
    for path in tmp_path.glob("step-*/state.safetensors"):
        path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError) as told:
        checkpoints.latest()
    assert told.value.what.startswith("No checkpoint is intact: 10 steps are lost.")
    assert (told.value.where, told.value.code) == (str(tmp_path), 5)
    assert told.value.fix.startswith("Put an intact copy of one in its place")
    assert checkpoints.latest() is None
    folder = (tmp_path / "step-000000005.damaged").rename(tmp_path / "step-000000005")
    (folder / "state.safetensors").write_bytes(intact)
    found = checkpoints.latest()
    assert found is not None and found.step == 5


def test_weights_that_are_not_finite_are_never_kept(checkpoints: Checkpoints):
    """The state before stays the newest."""
    with pytest.raises(UserError, match="weight holds numbers that are not finite at step 15") as caught:
        checkpoints.save(State(15, {"weight": torch.tensor([1.0, float("nan")])}, []))
    assert caught.value.where == str(checkpoints.folder) and "Lower learning_rate" in caught.value.fix
    found = checkpoints.latest()
    assert found is not None and found.step == 10


FILLING = """
import sys
from pathlib import Path
import torch
from stages.errors import UserError
from stages.training.checkpoint import Checkpoints, State
checkpoints = Checkpoints(Path(sys.argv[1]), "print", keep=2)
try:
    for step, numbers in ((5, 10), (10, 300_000)):
        checkpoints.save(State(step, {"weight": torch.zeros(numbers)}, []))
        checkpoints.wait()
except UserError as error:
    print(error.what, error.fix, error.code, sep="\\n")
    print(error.where, checkpoints.latest().step, *(path.name for path in Path(sys.argv[1]).iterdir()))
"""


@pytest.mark.parametrize("limit", ["size=1m", "nr_inodes=7"])
def test_a_checkpoint_that_finds_no_room_leaves_the_one_before(tmp_path: Path, limit: str):
    """On a disk that is full indeed, of bytes or of files: told in a letter, and nothing half written stays."""
    mounted = within(f"mount -t tmpfs -o {limit} none {shlex.quote(str(tmp_path))}")
    filling = [sys.executable, "-c", FILLING, str(tmp_path)]
    told = subprocess.run([*mounted, *filling], capture_output=True, text=True, check=True)
    what, fix, code, rest = told.stdout.splitlines()
    assert what == "The checkpoint could not be written: No space left on device." and code == "3"
    assert fix.startswith("Free some space") and fix.endswith("it goes on from the checkpoint before.")
    assert rest.split() == [str(tmp_path), "5", "step-000000005"]


def test_tensors_are_kept_as_they_were_when_saved(tmp_path: Path):
    """Steps that go on while the file is being written change nothing in it."""
    weight = torch.zeros(1000)
    checkpoints = Checkpoints(tmp_path, "print", keep=1)
    checkpoints.save(State(1, {"weight": weight}, []))
    weight += 1
    checkpoints.wait()
    found = checkpoints.latest()
    assert found is not None and not found.tensors["weight"].any()
