"""Fault injection: each requested fault happens at its place, once."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.errors import UserError
from stages.formats import artifact
from stages.runtime import fault_injection
from stages.runtime.fault_injection import FAULT_VARIABLE, Fault, inject_faults, requested_faults


@pytest.fixture
def request_faults(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda text: monkeypatch.setenv(FAULT_VARIABLE, text)


def test_no_fault_happens_by_default(tmp_path: Path):
    """Without the variable, nothing is injected and no marker is left."""
    assert FAULT_VARIABLE not in os.environ
    assert not inject_faults("vqvae", 0, 0, tmp_path)
    assert not any(tmp_path.iterdir())


def test_several_faults_are_parsed_in_order(request_faults):
    """A stage may be spelled as on the command line or as in DVC."""
    request_faults("kill@vqvae:0:13, nan@prior_top:1:2,full@prior@top:0:20")
    assert requested_faults() == [
        Fault("kill", "vqvae", 0, 13),
        Fault("nan", "prior_top", 1, 2),
        Fault("full", "prior_top", 0, 20),
    ]


def test_unknown_stage_is_rejected_if_the_stages_are_given(request_faults):
    """Its fault would never happen, and a test would pass without it."""
    request_faults("kill@vqvea:0:13")
    assert requested_faults() == [Fault("kill", "vqvea", 0, 13)]
    with pytest.raises(UserError, match="must name one of the stages shard, vqvae, got 'vqvea'") as caught:
        requested_faults(["shard", "vqvae"])
    assert caught.value.code == 2 and caught.value.fix


@pytest.mark.parametrize(
    "text", ["melt@vqvae:0:1", "kill", "kill@vqvae:0", "kill@vqvae:0:-1", "kill@:0:1", "kill@a:0:1,"]
)
def test_malformed_fault_is_rejected(request_faults, tmp_path: Path, text: str):
    """The error has the text, every kind and an example."""
    request_faults(text)
    with pytest.raises(UserError) as caught:
        inject_faults("codes", 0, 0, tmp_path)
    assert caught.value.what == (
        f"{FAULT_VARIABLE} must hold kind@stage:rank:step with a kind of "
        f"kill, term, stop, raise, exit, full, nan, slow, got {text.split(',')[-1]!r}."
    )
    assert "VQVAE2_FAULT=kill@vqvae:0:13" in caught.value.fix and caught.value.code == 2


@pytest.mark.parametrize("place", [("vqvae", 1, 3), ("vqvae", 0, 4), ("codes", 0, 3)])
def test_fault_happens_only_at_its_stage_rank_and_step(request_faults, tmp_path: Path, place: tuple[str, int, int]):
    """Another stage, rank or step has no fault."""
    request_faults("raise@vqvae:0:3")
    inject_faults(*place, tmp_path)
    with pytest.raises(RuntimeError, match="requested by"):
        inject_faults("vqvae", 0, 3, tmp_path)


def test_fault_happens_once_per_work_folder(request_faults, tmp_path: Path):
    """A resumed run has no fault; a run in another folder has it."""
    request_faults("raise@prior_top:0:3")
    for work_dir in (tmp_path / "first", tmp_path / "second"):
        work_dir.mkdir()
        with pytest.raises(RuntimeError):
            inject_faults("prior@top", 0, 3, work_dir)
        assert not inject_faults("prior@top", 0, 3, work_dir)


def test_only_a_nan_fault_returns_true(request_faults, tmp_path: Path):
    """The caller injects the NaN, at that step only."""
    request_faults("nan@vqvae:0:3")
    assert [inject_faults("vqvae", 0, step, tmp_path) for step in range(5)] == [False, False, False, True, False]


def test_full_disk_fails_one_write(request_faults, tmp_path: Path):
    """The next artifact fails as on a full disk and leaves nothing; the one after is written."""
    request_faults("full@codes:0:0")
    inject_faults("codes", 0, 0, tmp_path)
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
def test_fault_ends_its_process(tmp_path: Path, kind: str, status: int):
    """The exit status is that of the signal, the exit or the error."""
    assert _start_process(tmp_path, kind).wait(20) == status


def test_stop_fault_pauses_its_process(tmp_path: Path):
    """The process is stopped and does not end."""
    process = _start_process(tmp_path, "stop")
    try:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
    finally:
        process.kill()
        process.wait()


def test_slow_fault_sleeps(request_faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The step continues after the pause."""
    pauses: list[float] = []
    monkeypatch.setattr(fault_injection.time, "sleep", pauses.append)
    request_faults("slow@sample:0:0")
    assert not inject_faults("sample", 0, 0, tmp_path)
    assert pauses == [fault_injection.SLOW_FAULT_S]


def _start_process(work_dir: Path, kind: str) -> subprocess.Popen[bytes]:
    """Start a process that injects one fault into itself."""
    code = f"""
from pathlib import Path
from stages.runtime.fault_injection import inject_faults
inject_faults("codes", 0, 0, Path({str(work_dir)!r}))
"""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[3],
        env={**os.environ, FAULT_VARIABLE: f"{kind}@codes:0:0"},
        stderr=subprocess.DEVNULL,
    )
