"""A journal keeps what was reported, whatever happens to the process."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stages.tracking.journal import Journal, ending, latest, locked, points, read, without_secrets

ROOT = Path(__file__).parents[3]


def entries(journal):
    return [entry for entry, _ in read(journal.path)]


def test_a_journal_gives_back_what_was_reported(tmp_path):
    """Metrics, pictures and notes come back in order, with their steps and times."""
    journal = Journal(tmp_path)
    journal.metrics({"loss": 0.5}, 1)
    journal.picture("levels/top", b"png", 2)
    journal.note("half way")

    metrics, picture, note = entries(journal)
    assert metrics["values"] == {"loss": 0.5} and metrics["step"] == 1 and metrics["time"] > 0
    assert (tmp_path / picture["file"]).read_bytes() == b"png" and picture["step"] == 2
    assert note["text"] == "half way"


def test_a_resumed_run_repeats_steps_and_the_last_value_holds(tmp_path):
    """Opening a journal again goes on where it stopped; a step reported twice is one point."""
    first = Journal(tmp_path)
    for step in range(5):
        first.metrics({"loss": step}, step)
    first.close()
    second = Journal(tmp_path)
    for step in range(3, 8):
        second.metrics({"loss": 10 * step}, step)

    assert points(second.path) == {"loss": {0: 0, 1: 1, 2: 2, 3: 30, 4: 40, 5: 50, 6: 60, 7: 70}}


def test_a_torn_line_costs_itself_only(tmp_path):
    """A line cut anywhere is passed over, and what is written after it is read."""
    whole = Journal(tmp_path / "whole")
    whole.metrics({"loss": 1.0}, 1)
    whole.metrics({"loss": 2.0}, 2)
    raw = whole.path.read_bytes()
    last = raw.index(b"\n") + 1
    for length in range(last, len(raw) - 1):
        folder = tmp_path / str(length)
        folder.mkdir()
        (folder / "journal.jsonl").write_bytes(raw[:length])
        torn = Journal(folder)
        assert points(torn.path) == {"loss": {1: 1.0}}
        torn.metrics({"loss": 3.0}, 3)
        torn.close()
        assert points(torn.path)["loss"].keys() >= {1, 3}


def test_values_that_json_lacks_survive(tmp_path):
    """Infinities and what is no number are kept, and every line is strict JSON."""
    journal = Journal(tmp_path)
    journal.metrics({"a": math.inf, "b": -math.inf, "c": math.nan}, 0)

    def refuse(constant):
        raise AssertionError(constant)

    json.loads(journal.path.read_text(), parse_constant=refuse)
    curves = points(journal.path)
    assert (curves["a"][0], curves["b"][0]) == (math.inf, -math.inf) and math.isnan(curves["c"][0])


def test_a_killed_process_loses_nothing(tmp_path):
    """Everything reported before a kill -9 is in the journal, and its lock is free."""
    script = (
        "import os, signal, sys; from pathlib import Path; from stages.tracking.journal import Journal, locked\n"
        "with locked(Path(sys.argv[1])):\n"
        "    journal = Journal(Path(sys.argv[1]))\n"
        "    for step in range(1000): journal.metrics({'loss': step}, step)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT)

    assert done.returncode == -signal.SIGKILL
    assert len(points(tmp_path / "journal.jsonl")["loss"]) == 1000
    assert ending(tmp_path / "journal.jsonl") == ""
    with locked(tmp_path) as ours:
        assert ours


def test_reading_goes_on_from_an_offset(tmp_path):
    """A reader that remembers its offset sees each entry once."""
    journal = Journal(tmp_path)
    journal.note("one")
    ((_, offset),) = read(journal.path)
    journal.note("two")
    assert [entry["text"] for entry, _ in read(journal.path, offset)] == ["two"]


def test_secrets_do_not_reach_the_journal(tmp_path):
    """Passwords in addresses, and settings named as secrets, are masked before they are written."""
    journal = Journal(tmp_path)
    journal.begin(
        "key",
        "vqvae",
        "f",
        {"source": "https://me:hunter2@host/images", "api_key": "hunter2"},
        {"S3_SECRET": "hunter2"},
        inputs={},
        parent="",
    )
    journal.note("reading s3://me:hunter2@bucket")
    journal.end("FAILED", error="no answer from postgresql://me:hunter2@db/mlflow")

    assert "hunter2" not in journal.path.read_text()
    assert entries(journal)[0]["params"] == {"source": "https://***@host/images", "api_key": "***"}
    assert without_secrets("s3://me:hunt/er@2@bucket/a, then more") == "s3://***@bucket/a, then more"
    for harmless in ("https://host/a@b", "https://host:8080/a@b"):
        assert without_secrets(harmless) == harmless


def test_final_numbers_are_those_the_stage_wrote_or_the_last_of_each_curve(tmp_path):
    """A metrics file is flattened; without one, curves end in their last values, and the machine's do not count."""
    written = Journal(tmp_path / "written")
    written.metrics({"loss": 1.0}, 7)
    (tmp_path / "metrics.json").write_text('{"validation": {"mse": 0.5, "name": "x", "good": true}, "images": 3}')
    written.end("FINISHED", metrics=tmp_path / "metrics.json", outputs=[tmp_path / "metrics.json", tmp_path / "absent"])
    plain = Journal(tmp_path / "plain")
    plain.metrics({"loss": 2.0}, 1)
    plain.metrics({"loss": 1.0, "system/cpu": 9.0}, 2)
    plain.end("FINISHED")

    assert entries(written)[-1]["final"] == {"validation.mse": 0.5, "images": 3.0}
    assert points(written.path)["final/validation.mse"] == {7: 0.5}
    assert entries(written)[-1]["outputs"] == ["metrics.json"] and (tmp_path / "written/outputs/metrics.json").is_file()
    assert entries(plain)[-1]["final"] == {"loss": 1.0}


def test_a_damaged_metrics_file_spoils_no_finished_run(tmp_path):
    """The end is recorded, and the failure is kept to be told."""
    (tmp_path / "metrics.json").write_text("{")
    journal = Journal(tmp_path)
    journal.end("FINISHED", metrics=tmp_path / "metrics.json")
    assert ending(journal.path) == "FINISHED" and journal.failure is not None


def test_a_line_that_a_filling_disk_cut_spoils_no_other(tmp_path, monkeypatch):
    """The loss is known, and what is reported once there is space again is kept."""
    journal, write = Journal(tmp_path), os.write
    journal.metrics({"loss": 1.0}, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, data: write(file, data[:10]))
        journal.metrics({"loss": 2.0}, 2)
    journal.metrics({"loss": 3.0}, 3)
    assert points(journal.path) == {"loss": {1: 1.0, 3: 3.0}} and journal.failure is not None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_a_full_disk_stops_no_training(tmp_path):
    """Reports that cannot be written are lost without an exception, and the failure is kept to be told."""
    (tmp_path / "journal.jsonl").symlink_to("/dev/full")
    journal = Journal(tmp_path)
    journal.metrics({"loss": 1.0}, 1)
    assert "No space left" in str(journal.failure)


def test_the_latest_run_goes_on_unless_it_ended_well_or_differs(tmp_path):
    """A failed or killed run is continued; after a finished one, and for another fingerprint, a new one begins."""

    def opened(fingerprint, status):
        with latest(tmp_path, fingerprint) as folder:
            journal = Journal(folder)
            journal.begin(folder.name, "vqvae", fingerprint, {}, {}, inputs={}, parent="")
            if status:
                journal.end(status)
            journal.close()
            return folder

    first = opened("a", "FAILED")
    assert opened("a", "") == first
    assert opened("a", "FINISHED") == first
    second = opened("a", "FAILED")
    assert second != first
    third = opened("b", "KILLED")
    assert third not in (first, second)


def test_two_processes_never_share_a_journal(tmp_path):
    """A run that is at work is not continued by somebody else."""
    with latest(tmp_path, "a") as folder:
        Journal(folder).begin(folder.name, "vqvae", "a", {}, {}, inputs={}, parent="")
        with latest(tmp_path, "a") as other:
            assert other != folder
