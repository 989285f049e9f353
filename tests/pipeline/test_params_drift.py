"""Tests of the notes about settings that change when params.yaml is recomposed."""

import os
from pathlib import Path

import pytest

from pipeline import composed_from, params
from pipeline.commands import config
from pipeline.compose import compose_params, compose_settings
from pipeline.params_drift import drift, repeating_overrides

EARLIER = ("train_vqvae.steps=500", "experiment=smoke")


def edit_conf(old: str, new: str) -> None:
    """Edit conf/config.yaml and make it newer than params.yaml on file systems of any time resolution."""
    path = Path("conf/config.yaml")
    path.write_text(path.read_text().replace(old, new))
    later = params.FILE.stat().st_mtime + 2
    os.utime(path, (later, later))


@pytest.mark.parametrize(
    ("overrides", "note"),
    [
        (["seed=3"], "train_vqvae.steps 500 -> {demo}, experiment=smoke"),
        (["experiment=smoke", "cluster=local"], "train_vqvae.steps 500 -> {smoke}"),
        (["train_vqvae.steps=600", "experiment=smoke"], ""),
        ([*EARLIER, "seed=3"], ""),
        (list(EARLIER), ""),
    ],
    ids=["both", "one", "changed", "more", "same"],
)
def test_dropped_overrides_are_printed(current_project, capsys, overrides, note):
    """Earlier overrides that are not repeated are printed, with the options that repeat them; others are not."""
    demo, smoke = (compose_settings(choice)[1].train_vqvae.steps for choice in ([], ["experiment=smoke"]))
    config.run(EARLIER, write=True)
    assert capsys.readouterr().err == ""
    config.run(overrides, write=True)
    options = " ".join(f"-S {override}" for override in EARLIER if override.partition("=")[0] in note)
    note = (
        f"note: back to conf/: {note.format(demo=demo, smoke=smoke)}. To keep them, repeat: {options}\n" if note else ""
    )
    assert capsys.readouterr().err == note


def test_dropped_edits_of_the_file_are_printed(current_project, capsys):
    """So are settings that were edited in params.yaml."""
    steps = params.load().train_vqvae.steps
    current_project.edit(lambda data: data["train_vqvae"].update(steps=700))
    current_project.edit(lambda data: data.update(seed=5))
    config.run(["seed=6"], write=True)
    change = f"train_vqvae.steps 700 -> {steps}"
    assert capsys.readouterr().err == (
        f"note: back to conf/: {change}. To keep them, repeat: -S train_vqvae.steps=700\n"
    )


def test_deletions_in_the_file_are_repeated(current_project):
    """A mapping that was emptied, and a level that was removed with its prior, stay away."""
    overrides = ["experiment=emoji32", "priors.top.train.steps=900", "seed=3"]
    config.run(overrides, write=True)
    current_project.edit(lambda data: data["sample"].update(level_rules={}))
    current_project.edit(lambda data: (data["vqvae"]["levels"].pop("top"), data["priors"].pop("top")))
    repeated = repeating_overrides(params.read())
    deletions = ["~vqvae.levels.top", "~priors.top", "~sample.level_rules.top"]
    assert sorted(repeated) == sorted(["experiment=emoji32", "seed=3", *deletions])
    assert composed_from.settings_of(compose_params(repeated)) == composed_from.settings_of(params.read())


def test_entry_that_an_override_added_can_be_deleted(current_project):
    """Such as the resources of a stage, of which conf/ has none."""
    config.run(["+cluster.stages.prior.workers=1", "seed=3"], write=True)
    current_project.edit(lambda data: data["cluster"]["stages"].clear())
    assert repeating_overrides(params.read()) == ["seed=3"]


def test_settings_that_a_file_lacks_have_their_defaults(current_project):
    """A setting of a later release, or one without a value, is no deletion; nor is a rule that an override added."""
    config.run(["+sample.level_rules.bottom.temperature=0.5"], write=True)
    current_project.edit(lambda data: data["sample"]["level_rules"].pop("bottom"))
    current_project.edit(lambda data: (data["train_vqvae"].pop("weight_decay"), data["train_vqvae"].pop("microbatch")))
    assert repeating_overrides(params.read()) == []


def test_run_prints_dropped_overrides(current_project):
    """-S has the same meaning in `run`, also with --dry-run."""
    config.run(["seed=3"], write=True)
    done = current_project.command("run", "--dry-run", "-S", "cluster=single")
    assert done.stderr == "note: back to conf/: seed 3 -> 0. To keep them, repeat: -S seed=3\n" and done.returncode == 0
    assert composed_from.read_overrides() == ["seed=3"]


def test_changed_conf_is_reported(current_project):
    """Run, status and doctor print the difference and the command that regenerates params.yaml with its overrides."""
    config.run(["cluster=single"], write=True)
    assert drift() == ("", "")
    edit_conf("seed: 0", "seed: 0  # a comment changes nothing")
    assert drift() == ("", "")
    edit_conf("seed: 0", "seed: 4")
    difference = "params.yaml differs from what conf/ composes to: seed 0 -> 4"
    command = "vqvae2 config cluster=single --write"
    note = f"note: {difference}. Regenerate it: {command}\n"
    assert (
        current_project.command("status", "--json").stderr == current_project.command("run", "--dry-run").stderr == note
    )
    doctor = current_project.command("doctor").stdout
    assert f"warning  settings       {difference}\n" in doctor and f"fix: Regenerate it: {command}\n" in doctor
    assert current_project.command(*command.split()[1:]).returncode == 0
    assert drift() == ("", "") and params.load().seed == 4


def test_edited_params_yaml_is_no_difference(current_project):
    """Settings from an editor, from Git or from `dvc exp run --no-hydra` are used as they are."""
    current_project.edit(lambda data: data.update(seed=7))
    edit_conf("seed: 0", "seed: 4")
    assert drift() == ("", "")


def test_dry_run_restores_the_time_of_params_yaml(current_project):
    """A change of conf/ is still reported after a dry run has restored params.yaml."""
    edit_conf("seed: 0", "seed: 4")
    current_project.command("run", "--dry-run", "-S", "cluster=single")
    assert "seed 0 -> 4" in drift()[0]


def test_invalid_conf_is_reported_without_an_error(current_project):
    """params.yaml is valid by itself, so a conf/ that does not compose is only a note."""
    edit_conf("seed: 0", "seed: [")
    difference, fix = drift()
    assert "is not valid now: config.yaml is not valid YAML" in difference and fix == "Fix that line."


def test_lock_files_of_editors_in_conf_are_ignored(current_project):
    """Emacs marks an edited file with a dangling link."""
    Path("conf/.#config.yaml").symlink_to("somebody@somewhere.1234:1")
    assert drift() == ("", "")
