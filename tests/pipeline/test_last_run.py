"""Tests of the comparison of a run's settings with those of the run before."""

import re
from pathlib import Path

import pytest

from pipeline import last_run, params, run_name

BEFORE = {
    "seed": 0,
    "dataset": {"name": "folder", "source": "data/mine"},
    "vqvae": {"levels": {"top": {"entries": 32}}},
    "train_vqvae": {"steps": 8},
    "sample": {"temperature": 1.0},
    "cluster": {"workers": 1},
    "composed_from": {
        "choices": {"cluster": "single", "dataset": "folder", "vqvae": "smoke", "experiment": "mine"},
        "overrides": ["experiment=mine", "dataset=folder"],
    },
}
AFTER = {
    "seed": 0,
    "dataset": {"name": "emoji", "source": "data/emoji.zip"},
    "vqvae": {"levels": {"top": {"entries": 64}}},
    "train_vqvae": {"steps": 8},
    "sample": {"temperature": 0.7},
    "cluster": {"workers": 2},
    "composed_from": {
        "choices": {"cluster": "local", "dataset": "emoji", "vqvae": "two_level", "experiment": "emoji32"},
        "overrides": [],
    },
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch):
    """An empty project as the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    return tmp_path


def test_data_set_and_preset_come_first_and_the_cluster_last():
    """Choices of groups come before the settings that they change."""
    keys = [change.key for change in last_run.compare(BEFORE, AFTER)]
    assert keys == [
        "dataset", "dataset.name", "dataset.source", "experiment", "vqvae",
        "vqvae.levels.top.entries", "sample.temperature", "cluster", "cluster.workers",
    ]  # fmt: skip


def test_settings_without_choices_are_compared_by_their_values():
    """A params.yaml of another origin has no choices: that is no change."""
    without = {key: value for key, value in AFTER.items() if key != "composed_from"}
    assert last_run.compare(without, AFTER) == []


def test_description_has_at_most_ten_lines():
    """The number of the other settings is in the last line."""
    before = {"dataset": {"source": "a"}, "train_vqvae": {f"setting_{i}": 0 for i in range(20)}}
    after = {"dataset": {"source": "b"}, "train_vqvae": {f"setting_{i}": 1 for i in range(20)}}
    lines = last_run.describe(last_run.compare(before, after)).splitlines()
    assert len(lines) == 10
    assert lines[:2] == ["Changes against the last run:", '  dataset.source "a" -> "b"']
    assert lines[-1] == "  and 13 more settings"
    assert last_run.describe([]) == ""


def test_changes_have_no_credentials():
    """Neither the printed lines nor the name of a run show the password of a URL."""
    after = {"cluster": {"storage": "s3://AKIA:hunter2@bucket/p"}, "keep_results": ["s3://AKIA:hunter2@bucket/q"]}
    differences = last_run.compare({}, after)
    text = last_run.describe(differences) + run_name.run_name("emoji", differences[::-1])
    assert "hunter2" not in text and text.count("s3://***@bucket/") >= 2


def test_repeated_run_keeps_its_changes(folder):
    """The first run changes nothing; a run that resumes is not compared with itself."""
    assert last_run.since_last_run(BEFORE) == []
    last_run.record_run(BEFORE)
    assert last_run.since_last_run(AFTER) == last_run.compare(BEFORE, AFTER)
    last_run.record_run(AFTER)
    last_run.record_run(AFTER)
    assert last_run.since_last_run(AFTER) == []
    assert last_run.of_recorded_run() == last_run.compare(BEFORE, AFTER)


def test_changed_list_is_recorded_and_read_back(folder):
    """The record has the list twice, as a setting and as a change, and is valid without YAML aliases."""
    last_run.record_run({"keep_results": ["a"], "sample": {"classes": []}})
    after = {"keep_results": ["b", "c"], "sample": {"classes": ["flags"]}}
    last_run.record_run(after)
    recorded = [(change.key, change.after) for change in last_run.of_recorded_run()]
    assert recorded == [("sample.classes", ["flags"]), ("keep_results", ["b", "c"])]
    assert last_run.since_last_run(after) == []


@pytest.mark.parametrize(
    "text", ["a: [", "a: &x [1]\nb: *x\n", "- a", "settings: 1", "settings: {}\nchanges: [[a]]", b"\xff", ""]
)
def test_damaged_record_counts_as_none(folder, text):
    """A run starts, and replaces the record."""
    last_run.RECORD.parent.mkdir()
    last_run.RECORD.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert last_run.since_last_run(AFTER) == [] and last_run.of_recorded_run() == []
    last_run.record_run(BEFORE)
    assert last_run.since_last_run(AFTER) == last_run.compare(BEFORE, AFTER)


def test_copy_of_the_project_reads_the_record_and_does_not_write_it(folder, monkeypatch):
    """`dvc exp run --temp` and the queue run in copies without runs/."""
    last_run.record_run(BEFORE)
    copy = folder / ".dvc" / "tmp" / "exps" / "copy"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("DVC_ROOT", str(folder))
    assert last_run.since_last_run(AFTER) == last_run.compare(BEFORE, AFTER)
    last_run.record_run(AFTER)
    assert list(copy.iterdir()) == [] and last_run.since_last_run(BEFORE) == []


def test_run_prints_its_changes_before_anything_runs(current_project):
    """A dry run prints them too and does not count as a run; without changes or an earlier run nothing is printed."""
    assert "Changes against" not in current_project.command("run", "--dry-run").stdout
    last_run.record_run(params.read())
    assert "Changes against" not in current_project.command("run", "--dry-run").stdout
    for _ in range(2):
        done = current_project.command("run", "--dry-run", "-S", "experiment=smoke")
        lines = done.stdout.splitlines()
        assert lines[:3] == [
            "Changes against the last run:",
            "  dataset.image_size 32 -> 16",
            '  experiment "emoji32" -> "smoke"',
        ]
        assert re.fullmatch(r"  and \d+ more settings", lines[9]) and "would run" in lines[10]


def test_first_stage_of_plain_dvc_prints_and_records_the_changes(current_project):
    """`vqvae2 run` has done both before it starts DVC, and `vqvae2 versions --write` by itself is not a run."""
    last_run.record_run(params.read())
    current_project.edit(lambda data: data.update(seed=3))
    for by_hand in ({}, {"DVC_STAGE": "result_versions", "VQVAE2_RUN": "/tmp/run"}):
        assert current_project.command("versions", "--write", **by_hand).stdout == ""
    by_dvc = current_project.command("versions", "--write", DVC_STAGE="result_versions").stdout
    assert by_dvc == "Changes against the last run:\n  seed 0 -> 3\n"
    assert [change.key for change in last_run.of_recorded_run()] == ["seed"]
