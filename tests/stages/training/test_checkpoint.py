"""Only complete, intact checkpoints of the same run are used."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stages.errors import UserError
from stages.formats.artifact import MANIFEST
from stages.training.checkpoint import Checkpoints, find_not_finite
from stages.training.checkpoint_state import TrainState
from tests.mounts import mount_prefix


def state_of(step: int) -> TrainState:
    return TrainState(
        step, {"weight": torch.full((4,), float(step))}, [{"step": step, "name": "train/x", "value": 0.5}]
    )


@pytest.fixture
def messages() -> list[str]:
    return []


@pytest.fixture
def checkpoints(tmp_path: Path, messages: list[str]) -> Checkpoints:
    """The checkpoints of steps 5 and 10."""
    checkpoints = Checkpoints(tmp_path, "print", keep=2, notify=messages.append)
    for step in (5, 10):
        checkpoints.save(state_of(step))
    checkpoints.wait()
    return checkpoints


def test_the_newest_state_is_read_back(checkpoints: Checkpoints):
    """Step, tensors and history are equal to what was saved."""
    latest = checkpoints.latest()
    assert latest is not None and latest.step == 10 and latest.history == state_of(10).history
    torch.testing.assert_close(latest.tensors["weight"], torch.full((4,), 10.0), rtol=0, atol=0)


def test_old_checkpoints_are_removed(checkpoints: Checkpoints, tmp_path: Path):
    """The newest two remain once a newer one is complete; one that was killed while it was written does not."""
    (tmp_path / ".step-000000013.writing").mkdir()
    checkpoints.save(state_of(15))
    checkpoints.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000010", "step-000000015"]


@pytest.mark.parametrize("byte", range(0, 400, 7))
def test_a_flipped_bit_makes_the_previous_checkpoint_the_newest(
    checkpoints: Checkpoints, tmp_path: Path, messages: list[str], byte: int
):
    """No damaged state is loaded, and a message has the number of lost steps."""
    path = tmp_path / "step-000000010" / "state.safetensors"
    data = bytearray(path.read_bytes())
    data[byte % len(data)] ^= 1
    path.write_bytes(data)
    latest = checkpoints.latest()
    assert latest is not None and latest.step == 5
    assert "5 steps are lost" in messages[-1]
    assert (tmp_path / "step-000000010.damaged").is_dir()


def test_a_flipped_bit_in_the_manifest_never_changes_the_state_read(
    checkpoints: Checkpoints, tmp_path: Path, messages: list[str]
):
    """With each byte damaged in turn, the saved state or the previous one is read."""
    folder, renamed = tmp_path / "step-000000010", tmp_path / "step-000000010.damaged"
    intact = (folder / MANIFEST).read_bytes()
    for index in range(len(intact)):
        damaged = bytearray(intact)
        damaged[index] ^= 1 << (index % 8)
        (folder / MANIFEST).write_bytes(damaged)
        latest = checkpoints.latest()
        assert latest is not None and latest.history == state_of(latest.step).history
        assert latest.step == (5 if renamed.exists() else 10)
        if renamed.exists():
            renamed.rename(folder)
    assert len(messages) > len(intact)  # two messages for nearly every byte


def test_a_second_damaged_checkpoint_of_a_step_replaces_the_first(checkpoints: Checkpoints, tmp_path: Path):
    """An older step-*.damaged folder does not stop training from resuming."""
    for _ in range(2):
        (tmp_path / "step-000000010" / "state.safetensors").write_bytes(b"x")
        latest = checkpoints.latest()
        assert latest is not None and latest.step == 5
        checkpoints.save(state_of(10))
        checkpoints.wait()


@pytest.mark.parametrize("name", [MANIFEST, "state.safetensors", "history.json"])
def test_a_missing_file_makes_the_previous_checkpoint_the_newest(checkpoints: Checkpoints, tmp_path: Path, name: str):
    """An incomplete checkpoint is not used."""
    (tmp_path / "step-000000010" / name).unlink()
    latest = checkpoints.latest()
    assert latest is not None and latest.step == 5


def test_a_checkpoint_of_another_fingerprint_is_not_used(checkpoints: Checkpoints, tmp_path: Path):
    """A checkpoint must match the fingerprint, not only the folder."""
    with pytest.raises(UserError, match="No checkpoint is intact"):
        Checkpoints(tmp_path, "another", keep=2).latest()


def test_without_an_intact_checkpoint_training_restarts_only_when_run_again(checkpoints: Checkpoints, tmp_path: Path):
    """The first attempt fails with the number of lost steps; a restored copy is then used."""
    intact = (tmp_path / "step-000000005" / "state.safetensors").read_bytes()
    for path in tmp_path.glob("step-*/state.safetensors"):
        path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError) as caught:
        checkpoints.latest()
    assert caught.value.what.startswith("No checkpoint is intact: 10 steps are lost.")
    assert (caught.value.where, caught.value.code) == (str(tmp_path), 5)
    assert caught.value.fix.startswith("Restore an intact copy of a checkpoint")
    assert checkpoints.latest() is None
    folder = (tmp_path / "step-000000005.damaged").rename(tmp_path / "step-000000005")
    (folder / "state.safetensors").write_bytes(intact)
    latest = checkpoints.latest()
    assert latest is not None and latest.step == 5


def test_non_finite_weights_are_not_saved(checkpoints: Checkpoints):
    """The previous state stays the newest."""
    with pytest.raises(UserError, match="weight must be finite, but is not at step 15") as caught:
        checkpoints.save(TrainState(15, {"weight": torch.tensor([1.0, float("nan")])}, []))
    assert caught.value.where == str(checkpoints.folder) and "Lower learning_rate" in caught.value.fix
    latest = checkpoints.latest()
    assert latest is not None and latest.step == 10


FILL_DISK = """
import sys
from pathlib import Path
import torch
from stages.errors import UserError
from stages.training.checkpoint import Checkpoints
from stages.training.checkpoint_state import TrainState
checkpoints = Checkpoints(Path(sys.argv[1]), "print", keep=2)
try:
    for step, numbers in ((5, 10), (10, 300_000)):
        checkpoints.save(TrainState(step, {"weight": torch.zeros(numbers)}, []))
        checkpoints.wait()
except UserError as error:
    print(error.what, error.fix, error.code, sep="\\n")
    print(error.where, checkpoints.latest().step, *(path.name for path in Path(sys.argv[1]).iterdir()))
"""


@pytest.mark.parametrize("limit", ["size=1m", "nr_inodes=7"])
def test_a_checkpoint_on_a_full_disk_leaves_the_previous_one(tmp_path: Path, limit: str):
    """On a disk without free bytes or free inodes, saving raises UserError and leaves no partial checkpoint."""
    mounted = mount_prefix(f"mount -t tmpfs -o {limit} none {shlex.quote(str(tmp_path))}")
    command = [*mounted, sys.executable, "-c", FILL_DISK, str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    what, fix, code, rest = process.stdout.splitlines()
    assert what == "The checkpoint could not be written: No space left on device." and code == "3"
    assert fix.startswith("Free some space") and fix.endswith("it continues from the previous checkpoint.")
    assert rest.split() == [str(tmp_path), "5", "step-000000005"]


def test_finite_values_whose_sum_overflows_are_saved(checkpoints: Checkpoints):
    """The quick check of sums alone would refuse them; one value that is not finite is still found."""
    large = torch.full((4,), 3e38)
    checkpoints.save(TrainState(15, {"large": large, "step": torch.tensor(3)}, []))
    checkpoints.wait()
    latest = checkpoints.latest()
    assert latest is not None and torch.equal(latest.tensors["large"], large)
    large[2] = -torch.inf
    assert find_not_finite({"step": torch.tensor(3), "weight": torch.ones(2), "large": large}) == "large"


def test_later_steps_do_not_change_a_saved_state(tmp_path: Path):
    """Tensors are copied when they are saved, before the file is written."""
    weight = torch.zeros(1000)
    checkpoints = Checkpoints(tmp_path, "print", keep=1)
    checkpoints.save(TrainState(1, {"weight": weight}, []))
    weight += 1
    checkpoints.wait()
    latest = checkpoints.latest()
    assert latest is not None and not latest.tensors["weight"].any()
