"""Tests of the lines that `vqvae2 run --dry-run` prints."""

from pathlib import Path

from pipeline import dvc_yaml, params
from pipeline.commands import dry_run
from pipeline.restore_prediction import PULL, RUN
from stages.tracking.durations import last_duration_s
from stages.tracking.journal import Journal

ROOT = Path(__file__).parents[3]
STAGES = dvc_yaml.stages(params.read(ROOT / "params.yaml"), ROOT / "dvc.yaml")


def record(folder: Path, key: str, *segments: tuple[float, float], status: str = "FINISHED") -> None:
    """Write the journal of a stage that computed during these segments of time."""
    for number, (start, end) in enumerate(segments):
        times = iter([start, end])
        journal = Journal(folder / "0123" / "tracked" / key, clock=lambda times=times: next(times))
        journal.begin(key, "vqvae", "fingerprint", {}, {}, inputs={}, parent="")
        if number + 1 < len(segments):
            journal.metrics({"loss": 1.0}, 1)  # the last record before the process was killed
        else:
            journal.end(status)
        journal.close()


def test_duration_leaves_out_interruptions(tmp_path: Path):
    """The newest finished run counts: an unfinished one says nothing about the whole."""
    assert last_duration_s(tmp_path) is None
    record(tmp_path, "20260101-000000-a", (0.0, 10.0))
    record(tmp_path, "20260102-000000-a", (100.0, 160.0), (5000.0, 5040.0))
    record(tmp_path, "20260103-000000-a", (9000.0, 9001.0), status="KILLED")
    assert last_duration_s(tmp_path) == 100


def test_plan_has_the_last_duration_and_at_most_three_reasons(tmp_path: Path):
    """A summary counts the stages."""
    record(tmp_path / "vqvae", "20260101-000000-a", (0.0, 4320.0))
    reasons = {"vqvae": [f"setting {number}" for number in range(9)], "prior@top": ["vqvae runs before it"]}
    lines = dry_run.format_plan(STAGES, reasons, {"vqvae": RUN, "prior@top": PULL}, tmp_path).splitlines()
    assert lines == [
        "vqvae         would run (last run took 1 h 12 min): setting 0; setting 1; setting 2 and 6 more",
        "prior_top     would be pulled: vqvae runs before it",
        "Stages: 1 would run; 1 would be pulled. Their last runs took 1 h 12 min in total.",
    ]
