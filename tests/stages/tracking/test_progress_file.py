"""Tests of the progress that another process reads."""

from pathlib import Path

from stages.tracking.progress_file import PROGRESS_FILE, ProgressFile, read_progress


def test_progress_is_read_back_with_its_time(tmp_path: Path):
    """Reports within a second are skipped, except the last one of all."""
    now = [100.0]
    progress = ProgressFile(tmp_path, clock=lambda: 5.0, timer=lambda: now[0])
    for done in (1, 2, 3):
        progress.progress(done, 10, "step", {"loss": 0.5})
        now[0] += 0.5
    state, time_s = read_progress(tmp_path)
    assert (state.done, state.total, state.unit, state.rate, state.numbers, time_s) == (
        3,
        10,
        "step",
        2,
        {"loss": 0.5},
        5,
    )
    progress.progress(10, 10, "step", {})
    assert read_progress(tmp_path)[0].done == 10


def test_missing_or_damaged_progress_is_none(tmp_path: Path):
    """The file is a convenience: no error may come from it."""
    assert read_progress(tmp_path) is None
    for text in ("", "[]", '{"time": 1}', '{"time": 1, "other": 2}'):
        (tmp_path / PROGRESS_FILE).write_text(text)
        assert read_progress(tmp_path) is None


def test_unwritable_folder_stops_no_run(tmp_path: Path):
    """The folder may have been deleted."""
    ProgressFile(tmp_path / "absent").progress(1, 2, "step", {})
