"""Computing times of stages, read from their journals."""

from pathlib import Path

from stages.tracking.journal import JOURNAL_FILE, read_records


def last_duration_s(folder: Path) -> float | None:
    """Return the computing time of the newest finished run of a stage, with its folder in runs/; None without one."""
    for path in sorted(folder.glob(f"*/tracked/*/{JOURNAL_FILE}"), key=lambda path: path.parent.name, reverse=True):
        if (duration_s := _duration_s(path)) is not None:
            return duration_s
    return None


def _duration_s(path: Path) -> float | None:
    """Return the seconds of a run from each start to its last record, without interruptions; None if unfinished."""
    total_s = start_s = end_s = 0.0
    status = ""
    for record, _ in read_records(path):
        if record["kind"] == "begin":
            total_s += end_s - start_s
            start_s = record["time"]
        end_s = record["time"]
        status = record.get("status", "")
    return total_s + end_s - start_s if status == "FINISHED" else None
