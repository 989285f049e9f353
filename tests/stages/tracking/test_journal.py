"""Tests of the journal: what is reported survives a killed process, a full disk and a truncated line."""

import json
import math
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stages.tracking.journal import (
    Journal,
    end_status,
    read_points,
    read_records,
    redact_secrets,
    resume_or_create_run,
    try_lock,
)

ROOT = Path(__file__).parents[3]


def records(journal):
    return [record for record, _ in read_records(journal.path)]


def test_records_can_be_read_back(tmp_path):
    """Metrics, images and messages are read in order, with their steps and times."""
    journal = Journal(tmp_path)
    journal.metrics({"loss": 0.5}, 1)
    journal.image("levels/top", b"png", 2)
    journal.message("half way")

    metrics, image, message = records(journal)
    assert metrics["values"] == {"loss": 0.5} and metrics["step"] == 1 and metrics["time"] > 0
    assert (tmp_path / image["file"]).read_bytes() == b"png" and image["step"] == 2
    assert message["text"] == "half way"


def test_last_value_of_a_repeated_step_is_valid(tmp_path):
    """A resumed run continues the journal; a step reported twice is one point."""
    first = Journal(tmp_path)
    for step in range(5):
        first.metrics({"loss": step}, step)
    first.close()
    second = Journal(tmp_path)
    for step in range(3, 8):
        second.metrics({"loss": 10 * step}, step)

    assert read_points(second.path) == {"loss": {0: 0, 1: 1, 2: 2, 3: 30, 4: 40, 5: 50, 6: 60, 7: 70}}


def test_truncated_line_is_skipped(tmp_path):
    """A line truncated at any byte is skipped, and the records after it are read."""
    complete = Journal(tmp_path / "complete")
    complete.metrics({"loss": 1.0}, 1)
    complete.metrics({"loss": 2.0}, 2)
    raw = complete.path.read_bytes()
    last = raw.index(b"\n") + 1
    for length in range(last, len(raw) - 1):
        folder = tmp_path / str(length)
        folder.mkdir()
        (folder / "journal.jsonl").write_bytes(raw[:length])
        truncated = Journal(folder)
        assert read_points(truncated.path) == {"loss": {1: 1.0}}
        truncated.metrics({"loss": 3.0}, 3)
        truncated.close()
        assert read_points(truncated.path)["loss"].keys() >= {1, 3}


def test_infinity_and_nan_are_stored_as_strict_json(tmp_path):
    """Infinity and NaN are read back, and every line is strict JSON."""
    journal = Journal(tmp_path)
    journal.metrics({"a": math.inf, "b": -math.inf, "c": math.nan}, 0)

    def refuse(constant):
        raise AssertionError(constant)

    json.loads(journal.path.read_text(), parse_constant=refuse)
    curves = read_points(journal.path)
    assert (curves["a"][0], curves["b"][0]) == (math.inf, -math.inf) and math.isnan(curves["c"][0])


def test_killed_process_loses_no_record(tmp_path):
    """Everything reported before SIGKILL is in the journal, and its lock is free."""
    script = (
        "import os, signal, sys; from pathlib import Path; from stages.tracking.journal import Journal, try_lock\n"
        "with try_lock(Path(sys.argv[1])):\n"
        "    journal = Journal(Path(sys.argv[1]))\n"
        "    for step in range(1000): journal.metrics({'loss': step}, step)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    process = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT)

    assert process.returncode == -signal.SIGKILL
    assert len(read_points(tmp_path / "journal.jsonl")["loss"]) == 1000
    assert end_status(tmp_path / "journal.jsonl") == ""
    with try_lock(tmp_path) as acquired:
        assert acquired


def test_reading_continues_from_an_offset(tmp_path):
    """A reader that keeps its offset reads each record once."""
    journal = Journal(tmp_path)
    journal.message("one")
    ((_, offset),) = read_records(journal.path)
    journal.message("two")
    assert [record["text"] for record, _ in read_records(journal.path, offset)] == ["two"]


def test_secrets_are_not_written(tmp_path):
    """Passwords in URLs, and settings with names of secrets, are masked before they are with_file."""
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
    journal.message("reading s3://me:hunter2@bucket")
    journal.end("FAILED", error="no answer from postgresql://me:hunter2@db/mlflow")

    assert "hunter2" not in journal.path.read_text()
    assert records(journal)[0]["params"] == {"source": "https://***@host/images", "api_key": "***"}
    assert redact_secrets("s3://me:hunt/er@2@bucket/a, then more") == "s3://***@bucket/a, then more"
    for harmless in ("https://host/a@b", "https://host:8080/a@b"):
        assert redact_secrets(harmless) == harmless


def test_metrics_file_is_reported_once(tmp_path):
    """Numbers of the metrics file that the run has not reported itself become points."""
    journal = Journal(tmp_path / "run")
    journal.metrics({"validation/psnr": 19.5}, 7)
    file = tmp_path / "evaluate.json"
    file.write_text('{"validation": {"psnr": 19.5, "name": "x", "good": true}, "psnr": 19.6}')
    journal.end(
        "FINISHED", metrics=file, headline=[file], outputs=[file, tmp_path / "absent"], pictures={"samples": file}
    )

    assert read_points(journal.path) == {"validation/psnr": {7: 19.5}, "psnr": {0: 19.6}}
    end = records(journal)[-1]
    assert end["headline"] == {"psnr": 19.6}
    assert (end["outputs"], end["pictures"]) == (["evaluate.json"], ["samples.png"])
    assert {path.name for path in (tmp_path / "run/outputs").iterdir()} == {"evaluate.json", "samples.png"}


def test_corrupt_metrics_file_does_not_fail_a_finished_run(tmp_path):
    """The end is recorded, and the error is kept."""
    (tmp_path / "metrics.json").write_text("{")
    journal = Journal(tmp_path)
    journal.end("FINISHED", metrics=tmp_path / "metrics.json")
    assert end_status(journal.path) == "FINISHED" and journal.write_error is not None


def test_partial_write_damages_no_other_record(tmp_path):
    """A write that is cut short is kept as an error; records written once there is space again can be read."""
    journal = Journal(tmp_path)
    journal.metrics({"loss": 1.0}, 1)
    soft_limit, hard_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (journal.path.stat().st_size + 10, hard_limit))
    try:
        journal.metrics({"loss": 2.0}, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft_limit, hard_limit))
    journal.metrics({"loss": 3.0}, 3)
    assert read_points(journal.path) == {"loss": {1: 1.0, 3: 3.0}} and journal.write_error is not None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_full_disk_raises_nothing(tmp_path):
    """Reports that cannot be written are lost without an exception, and the error is kept."""
    (tmp_path / "journal.jsonl").symlink_to("/dev/full")
    journal = Journal(tmp_path)
    journal.metrics({"loss": 1.0}, 1)
    assert "No space left" in str(journal.write_error)


def test_latest_run_is_resumed_unless_finished_or_different(tmp_path):
    """A failed or killed run is resumed; after a finished run, or for another fingerprint, a new run begins."""

    def run_once(fingerprint, status):
        with resume_or_create_run(tmp_path, fingerprint) as folder:
            journal = Journal(folder)
            journal.begin(folder.name, "vqvae", fingerprint, {}, {}, inputs={}, parent="")
            if status:
                journal.end(status)
            journal.close()
            return folder

    first = run_once("a", "FAILED")
    assert run_once("a", "") == first
    assert run_once("a", "FINISHED") == first
    second = run_once("a", "FAILED")
    assert second != first
    third = run_once("b", "KILLED")
    assert third not in (first, second)


def test_locked_journal_is_not_resumed(tmp_path):
    """A run that is still going on is not resumed by another process."""
    with resume_or_create_run(tmp_path, "a") as folder:
        Journal(folder).begin(folder.name, "vqvae", "a", {}, {}, inputs={}, parent="")
        with resume_or_create_run(tmp_path, "a") as other:
            assert other != folder
