"""Tests of the names of runs in MLflow."""

import pytest

from pipeline.last_run import Change
from pipeline.run_name import MAX_LENGTH, run_name, run_tags

TEMPERATURE = Change("sample.temperature", 0.7, 0.8)
STEPS = Change("train_vqvae.steps", 900, 5000)


@pytest.mark.parametrize(
    ("changes", "preset", "experiment", "expected"),
    [
        ([], "", "", "emoji"),
        ([], "emoji32", "", "emoji32"),
        ([], "smoke", "", "emoji · smoke"),
        ([TEMPERATURE], "emoji32", "", "temperature 0.8 · emoji32"),
        ([STEPS], "emoji32", "", "train_vqvae.steps 5000 · emoji32"),
        ([Change("priors.top.train.steps", 1, 2)], "emoji32", "", "top.train.steps 2 · emoji32"),
        ([Change("seed", 0, 1)], "emoji32", "", "seed 1 · emoji32"),
        ([Change("augment.flip", True, False)], "emoji32", "", "flip false · emoji32"),
        ([Change("sample.classes", None, ["flags"])], "emoji32", "", "classes [flags] · emoji32"),
        ([Change("vqvae.levels.middle.dim", 4, None)], "emoji32", "", "no dim · emoji32"),
        ([TEMPERATURE, Change("seed", 0, 1)], "emoji32", "", "temperature 0.8, seed 1 · emoji32"),
        ([TEMPERATURE, STEPS, Change("seed", 0, 1)], "emoji32", "", "temperature 0.8 +2 · emoji32"),
        ([TEMPERATURE], "emoji32", "balmy-gaff", "balmy-gaff · temperature 0.8 · emoji32"),
        ([TEMPERATURE, STEPS], "emoji32", "name-of-an-author", "name-of-an-author · 2 changes · emoji32"),
        ([Change("experiment", "emoji32", "smoke"), STEPS], "smoke", "", "emoji · smoke"),
    ],
)
def test_name_says_what_differs_from_the_run_before(changes, preset, experiment, expected):
    """It has the dataset, or a preset with the name of the dataset."""
    keys = ("sample.temperature", "train_vqvae.steps", "priors.top.train.steps", "priors.bottom.train.steps", "seed")
    name = run_name("emoji", changes, preset=preset, experiment=experiment, keys=keys)
    assert name == expected and len(name) <= MAX_LENGTH


def test_name_is_short_whatever_the_settings_are():
    """A long name of a dataset, or a long value, is cut."""
    assert len(run_name("photographs" * 9, [TEMPERATURE])) == MAX_LENGTH
    assert len(run_name("a", [Change("dataset.source", "b", "c" * 500)], experiment="d" * 30)) <= MAX_LENGTH


def test_tags_describe_a_run(current_project, monkeypatch):
    """Dataset, command and DVC's experiment are tags."""
    monkeypatch.setenv("DVC_EXP_NAME", "balmy-gaff")
    tags = run_tags({"dataset": {"name": "emoji"}}, "dvc exp run")
    assert tags == {
        "mlflow.runName": "balmy-gaff · emoji",
        "command": "dvc exp run",
        "dataset": "emoji",
        "dvc.experiment": "balmy-gaff",
    }
