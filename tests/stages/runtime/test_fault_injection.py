"""Faults on demand: those that were asked for, where they were asked for, once."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stages.errors import UserError
from stages.formats import artifact
from stages.runtime import fault_injection
from stages.runtime.fault_injection import VARIABLE, Fault, asked_for, at


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch):
    return lambda text: monkeypatch.setenv(VARIABLE, text)


def test_nothing_happens_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Off by default: no fault, no marker."""
    monkeypatch.delenv(VARIABLE, raising=False)
    assert not at("vqvae", 0, 0, tmp_path)
    assert not any(tmp_path.iterdir())


def test_several_faults_are_read_in_order(asked):
    """A stage may be spelled as on the command line or as in DVC."""
    asked("kill@vqvae:0:13, nan@prior_top:1:2,full@prior@top:0:20")
    assert asked_for() == [
        Fault("kill", "vqvae", 0, 13),
        Fault("nan", "prior_top", 1, 2),
        Fault("full", "prior_top", 0, 20),
    ]


def test_a_stage_that_is_not_there_is_refused_where_the_stages_are_known(asked):
    """Its fault would never come, and its absence would look like a proof."""
    asked("kill@vqvea:0:13")
    assert asked_for() == [Fault("kill", "vqvea", 0, 13)]
    with pytest.raises(UserError, match="names the stage 'vqvea', which is none of shard, vqvae") as refused:
        asked_for(["shard", "vqvae"])
    assert refused.value.code == 2 and refused.value.fix


@pytest.mark.parametrize(
    "text", ["melt@vqvae:0:1", "kill", "kill@vqvae:0", "kill@vqvae:0:-1", "kill@:0:1", "kill@a:0:1,"]
)
def test_what_cannot_be_read_is_refused_in_one_sentence(asked, tmp_path: Path, text: str):
    """With what was found, every kind there is, and an example."""
    asked(text)
    with pytest.raises(UserError) as refused:
        at("codes", 0, 0, tmp_path)
    assert refused.value.what == (
        f"{VARIABLE} holds {text.split(',')[-1]!r}, which is not kind@stage:rank:step with a kind of "
        "kill, term, stop, raise, exit, full, nan, slow."
    )
    assert "VQVAE2_FAULT=kill@vqvae:0:13" in refused.value.fix and refused.value.code == 2


@pytest.mark.parametrize("place", [("vqvae", 1, 3), ("vqvae", 0, 4), ("codes", 0, 3)])
def test_a_fault_comes_at_its_place_alone(asked, tmp_path: Path, place: tuple[str, int, int]):
    """Another stage, rank or step is left in peace."""
    asked("raise@vqvae:0:3")
    at(*place, tmp_path)
    with pytest.raises(RuntimeError, match="asked for"):
        at("vqvae", 0, 3, tmp_path)


def test_a_fault_comes_once_per_work_folder(asked, tmp_path: Path):
    """A resumed run does not fall again; a run in another folder does."""
    asked("raise@prior_top:0:3")
    for work in (tmp_path / "first", tmp_path / "second"):
        work.mkdir()
        with pytest.raises(RuntimeError):
            at("prior@top", 0, 3, work)
        assert not at("prior@top", 0, 3, work)


def test_only_a_spoilt_step_is_called_so(asked, tmp_path: Path):
    """The caller alone can spoil its numbers; every other fault does its own work."""
    asked("nan@vqvae:0:3")
    assert [at("vqvae", 0, step, tmp_path) for step in range(5)] == [False, False, False, True, False]


def test_a_full_disk_is_met_once(asked, tmp_path: Path):
    """The next artifact fails as on a full disk and leaves nothing; the one after is written."""
    asked("full@codes:0:0")
    at("codes", 0, 0, tmp_path)
    with (
        pytest.raises(OSError, match="No space left on device"),
        artifact.commit_folder(tmp_path / "out", "x", {}) as folder,
    ):
        (folder / "file").write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["fault-full-0-0"]
    with artifact.commit_folder(tmp_path / "out", "x", {}) as folder:
        (folder / "file").write_text("x")
    assert artifact.read(tmp_path / "out", "x").files.keys() == {"file"}


@pytest.mark.parametrize(
    ("kind", "status"), [("kill", -signal.SIGKILL), ("term", -signal.SIGTERM), ("exit", 1), ("raise", 1)]
)
def test_a_fault_ends_its_process(tmp_path: Path, kind: str, status: int):
    """By the signal, the status or the error of its name."""
    assert _process(tmp_path, kind).wait(20) == status


def test_a_stopped_process_stands_still(tmp_path: Path):
    """It is neither gone nor going on."""
    process = _process(tmp_path, "stop")
    try:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
    finally:
        process.kill()
        process.wait()


def test_a_slow_step_takes_its_time_and_goes_on(asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nothing but time is lost."""
    slept: list[float] = []
    monkeypatch.setattr(fault_injection.time, "sleep", slept.append)
    asked("slow@sample:0:0")
    assert not at("sample", 0, 0, tmp_path)
    assert slept == [fault_injection.SLOW_FAULT_S]


def _process(work: Path, kind: str) -> subprocess.Popen[bytes]:
    call = f"from pathlib import Path; from stages.runtime.fault_injection import at; at('codes', 0, 0, Path({str(work)!r}))"
    return subprocess.Popen(
        [sys.executable, "-c", call],
        cwd=Path(__file__).parents[3],
        env={**os.environ, VARIABLE: f"{kind}@codes:0:0"},
        stderr=subprocess.DEVNULL,
    )
