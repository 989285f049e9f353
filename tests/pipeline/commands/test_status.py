"""Tests of `vqvae2 status`."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline import dvc, dvc_yaml, locks, params, run_state
from pipeline.commands import run, status
from pipeline.fingerprint import work_folder
from stages.errors import UserError
from stages.formats import artifact
from stages.tracking.journal import Journal
from stages.tracking.progress_file import ProgressFile

STAGES = ["shard", "vqvae", "codes", "prior_top", "prior_bottom", "sample", "evaluate"]


def busy(*arguments):
    """DVC's answer while another process holds its lock."""
    raise UserError(f"{dvc.BUSY}: PID 7.", where=".", fix="Wait.", code=3)


def begin(work: Path, step: int, total: int) -> Journal:
    """Write what a training stage writes until a step; a checkpoint of the step before it is two hours old."""
    journal = Journal(work / "tracked" / "20260101-000000-abcdef")
    journal.begin("key", "vqvae", "fingerprint", {}, {}, inputs={}, parent="")
    clock = iter(range(100))
    progress = ProgressFile(work, timer=lambda: float(next(clock)))
    for done in (step - 2, step - 1, step):
        progress.progress(done, total, "step", {"loss": 0.5, "images/s": 64.0, "data %": 12.5})
    with artifact.commit_folder(work / f"step-{step - 1:09d}", "checkpoint", {}):
        pass
    two_hours_ago = time.time() - 7200
    os.utime(work / f"step-{step - 1:09d}" / "manifest.json", (two_hours_ago, two_hours_ago))
    return journal


def rows(capsys) -> dict:
    return {row["stage"]: row for row in json.loads(capsys.readouterr().out)["stages"]}


def test_json_has_state_and_reasons_of_each_stage(project):
    """--json is for programs."""
    facts = json.loads(project.command("status", "--json").stdout)
    assert [row["stage"] for row in facts["stages"]] == STAGES and facts["in_use_by"] is None
    assert all(row["state"] == "out of date" and row["reasons"] == ["it has not run yet"] for row in facts["stages"])


def test_source_that_contains_the_project_is_named(current_project):
    """DVC's error would be about .dvcignore."""
    data = params.read()
    data["dataset"]["source"] = ".."
    params.write(params.to_yaml(data).encode())
    with pytest.raises(UserError, match="contains the project"):
        status.StatusReader().read()


def test_running_stage_shows_step_rate_time_left_and_checkpoint(current_project, monkeypatch, capsys):
    """The text has the process and the command that hold the project; JSON has the same facts."""
    monkeypatch.setattr(dvc, "out_of_date_reasons", busy)
    with locks.exclusive_lock(Path("runs/vqvae")):
        begin(Path("runs/vqvae/0123456789abcdef"), 1200, 5000)
        assert status.show(as_json=False) == 0
        text = capsys.readouterr().out
        assert status.show(as_json=True) == 0
        row = rows(capsys)["vqvae"]
    (line,) = [line for line in text.splitlines() if line.startswith("vqvae")]
    assert (
        "running" in line
        and "1,200/5,000 steps (24%)" in line
        and " left, 3 s per step, 64 images/s, data 12%, " in line
    )
    assert "checkpoint of step 1,199 is 2 h old" in line
    assert f"In use by PID {os.getpid()} on" in " ".join(text.split()) and "(vqvae2" in text
    assert (row["progress"]["done"], row["progress"]["total"], row["checkpoint"]["step"]) == (1200, 5000, 1199)
    assert row["progress"]["rate"] > 0 and row["progress"]["remaining_s"] > 0
    assert f"PID {os.getpid()}" in row["owner"]


def test_other_stages_of_a_run_are_waiting_or_up_to_date(current_project, monkeypatch, capsys):
    """DVC is not asked while `vqvae2 run` holds the project: the run records how far it is."""
    monkeypatch.setattr(dvc, "out_of_date_reasons", busy)
    with locks.exclusive_lock(Path("runs")):
        state = run_state.RunState(Path("runs"), ["shard", "vqvae", "prior@top"], ["vqvae", "prior@top"])
        state.update(["shard", "vqvae"], "vqvae")
        with locks.exclusive_lock(Path("runs/vqvae")):
            status.show(as_json=True)
    states = {name: row["state"] for name, row in rows(capsys).items()}
    assert states == dict.fromkeys(STAGES, "unknown") | {
        "shard": "up to date",
        "vqvae": "running",
        "prior_top": "waiting",
    }


def test_state_left_by_a_killed_run_is_ignored(current_project, monkeypatch, capsys):
    """Only the run that holds the lock is believed."""
    run_state.RunState(Path("runs"), ["shard"], ["shard"]) if Path("runs").mkdir() else None
    monkeypatch.setattr(dvc, "out_of_date_reasons", lambda *_: {})
    status.show(as_json=True)
    assert {row["state"] for row in rows(capsys).values()} == {"up to date"}


def test_state_left_by_a_killed_run_is_not_that_of_the_next(current_project, monkeypatch):
    """It is deleted before the next run has asked DVC, which takes seconds."""
    Path("runs").mkdir()
    run_state.RunState(Path("runs"), ["shard"], [])

    def read_state(*_: object, **__: object) -> dict[str, list[str]]:
        assert locks.owner(Path("runs")) and run_state.read(Path("runs")) == {}
        return {}

    monkeypatch.setattr(dvc, "out_of_date_reasons", read_state)
    assert run.run() == 0


def test_missing_settings_are_named(current_project):
    """With the command that writes them."""
    params.FILE.unlink()
    with pytest.raises(UserError, match=r"params\.yaml does not exist") as caught:
        status.show(as_json=False)
    assert "vqvae2 config --write" in caught.value.fix and caught.value.code == 2


def test_other_dvc_process_is_named(current_project, monkeypatch, capsys):
    """While a plain `dvc repro` runs, the states are unknown, and the command does not fail."""
    monkeypatch.setattr(dvc, "out_of_date_reasons", busy)
    assert status.show(as_json=False) == 0
    text = capsys.readouterr().out
    assert "shard         unknown     DVC is busy" in text and "In use by PID 7" in text


def test_interrupted_stage_shows_where_it_resumes(current_project, monkeypatch, capsys):
    """An execution that has finished, or of other settings, is not shown."""
    with artifact.commit_folder(Path("artifacts/shards"), "shards", {}):
        pass
    stage = dvc_yaml.find("vqvae", dvc_yaml.stages(params.read()))
    work = work_folder(Path("runs/vqvae"), stage, params.load())
    journal = begin(work, 1200, 5000)
    begin(Path("runs/vqvae/other"), 3000, 5000)
    monkeypatch.setattr(dvc, "out_of_date_reasons", lambda *_: {"vqvae": ["it has not run yet"]})
    status.show(as_json=False)
    expected = "vqvae         out of date interrupted; resumes at step 1,199 of 5,000 (checkpoint is 2 h old); "
    assert f"{expected}it has not run yet\n" in capsys.readouterr().out
    journal.end("FINISHED")
    status.show(as_json=False)
    assert "interrupted" not in capsys.readouterr().out


def test_artifact_without_a_stage_is_listed(current_project, monkeypatch, capsys):
    """Settings have removed its stage, so it must not be taken for a result of theirs."""
    for name in ("shards", "accepted", "priors/top", "classifiers/shards"):
        with artifact.commit_folder(Path("artifacts") / name, "kind", {}):
            pass
    monkeypatch.setattr(dvc, "out_of_date_reasons", lambda *_: {})
    status.show(as_json=True)
    assert json.loads(capsys.readouterr().out)["leftovers"] == ["artifacts/accepted", "artifacts/classifiers/shards"]
    status.show(as_json=False)
    assert "no longer has: artifacts/accepted, artifacts/classifiers/shards." in " ".join(
        capsys.readouterr().out.split()
    )


def test_watch_without_a_terminal_prints_each_change_once(capsys):
    """A log file gets no repeated blocks, and JSON is one line each."""
    idle = status.Status("", [status.Row("shard", "out of date", ["it has not run yet"], None)])
    finished = status.Status("", [status.Row("shard", "up to date", [], None)])
    answers = iter([idle, idle, finished, finished])
    for as_json in (False, True):
        answers = iter([idle, idle, finished, finished])
        with suppress(StopIteration):
            status._watch(lambda answers=answers: next(answers), as_json=as_json, wait=lambda seconds: None)
        lines = [line for line in capsys.readouterr().out.splitlines() if line]
        assert len(lines) == 2 and "out of date" in lines[0] and "up to date" in lines[1]


def test_watch_ends_with_ctrl_c_without_an_error(project):
    """Ctrl-C is the usual end of --watch."""
    program = [sys.executable, "-c", "from pipeline.cli import main; main()", "status", "--watch"]
    process = subprocess.Popen(program, cwd=project.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("shard")
    process.send_signal(signal.SIGINT)
    assert (process.communicate(timeout=20)[1], process.returncode) == ("", 0)


def test_watch_asks_dvc_only_after_a_change(current_project, monkeypatch):
    """DVC takes seconds of processor time for an answer."""
    calls = []
    monkeypatch.setattr(dvc, "out_of_date_reasons", lambda *_: calls.append(1) or {})
    reader = status.StatusReader()
    reader.read()
    reader.read()
    assert len(calls) == 1
    current_project.edit(lambda data: data.update(seed=1))
    reader.read()
    assert len(calls) == 2
