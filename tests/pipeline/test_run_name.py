"""Tests of the names of runs in MLflow."""

import pytest

from pipeline.changes import Change
from pipeline.run_name import MAX_LENGTH, run_name, run_tags

TEMPERATURE = Change("sample.temperature", 0.7, 0.8)
STEPS = Change("train_vqvae.steps", 900, 5000)


@pytest.mark.parametrize(
    ("changes", "preset", "experiment", "expected"),
    [
        ([], "", "", "emoji"),
        ([], "emoji32", "", "emoji32"),
        ([], "smoke", "", "emoji · smoke"),
        ([TEMPERATURE], "emoji32", "", "emoji32 · sample.temperature 0.8"),
        ([Change("augment.flip", True, False)], "emoji32", "", "emoji32 · augment.flip false"),
        ([Change("sample.classes", None, ["flags"])], "emoji32", "", "emoji32 · sample.classes [flags]"),
        ([Change("vqvae.levels.middle", 4, None)], "emoji32", "", "emoji32 · no vqvae.levels.middle"),
        ([TEMPERATURE, STEPS], "emoji32", "", "emoji32 · temperature 0.8, steps 5000"),
        ([STEPS, TEMPERATURE, Change("seed", 0, 1)], "", "", "emoji · steps 5000, temperature 0.8 +1"),
        ([TEMPERATURE], "emoji32", "balmy-gaff", "emoji32 · balmy-gaff · temperature 0.8"),
        ([TEMPERATURE, STEPS], "emoji32", "name-of-an-author", "emoji32 · name-of-an-author · 2 changes"),
        ([Change("experiment", "emoji32", "smoke"), STEPS], "smoke", "", "emoji · smoke"),
    ],
)
def test_name_says_what_differs_from_the_run_before(changes, preset, experiment, expected):
    """It starts with the data set, or a preset with the name of the data set."""
    name = run_name("emoji", changes, preset=preset, experiment=experiment)
    assert name == expected and len(name) <= MAX_LENGTH


def test_name_is_short_whatever_the_settings_are():
    """A long name of a data set, or a long value, is cut."""
    assert len(run_name("photographs" * 9, [TEMPERATURE])) == MAX_LENGTH
    assert len(run_name("a", [Change("dataset.source", "b", "c" * 500)], experiment="d" * 30)) <= MAX_LENGTH


def test_tags_describe_a_run(current_project, monkeypatch):
    """Data set, command and DVC's experiment are tags."""
    monkeypatch.setenv("DVC_EXP_NAME", "balmy-gaff")
    tags = run_tags({"dataset": {"name": "emoji"}}, "dvc exp run")
    assert tags == {
        "mlflow.runName": "emoji · balmy-gaff",
        "command": "dvc exp run",
        "dataset": "emoji",
        "dvc.experiment": "balmy-gaff",
    }
