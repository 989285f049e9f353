"""Tests of `dvc exp run`: it changes the dataset and the preset only if the command says so."""

from pathlib import Path

import pytest

from pipeline import params
from pipeline.commands import config
from pipeline.compose import compose_params
from pipeline.dvc_experiment import require_asked, unasked_changes
from stages.errors import UserError
from tests.command_line_project import CommandLineProject

FOLDER = ["dataset=folder", "dataset.source=data/mine"]
SMOKE = "experiment=smoke"


def unasked(before, after):
    return [change.key for change in unasked_changes(compose_params(before), compose_params(after))]


@pytest.mark.parametrize(
    ("before", "after", "keys"),
    [
        ([SMOKE], ["seed=1"], ["experiment", "dataset.image_size"]),
        ([SMOKE], [SMOKE, "seed=1"], []),
        ([SMOKE], ["experiment=emoji32"], []),
        ([], [SMOKE], []),
        (["experiment=clothing64"], [SMOKE], []),
        (["experiment=clothing64"], ["dataset=clothing64"], ["experiment"]),
        (FOLDER, [], ["dataset", "dataset.name", "dataset.source", "dataset.image_size", "dataset.labels"]),
        (FOLDER, ["dataset=folder"], ["dataset.source"]),
        (FOLDER, ["dataset=emoji"], []),
        (FOLDER, ["dataset=folder", "dataset.source=data/others"], []),
        (FOLDER, ["experiment=clothing64"], []),  # the preset names its dataset
        (
            FOLDER,
            [SMOKE],
            ["dataset", "dataset.name", "dataset.source", "dataset.image_size", "dataset.labels"],
        ),  # this one does not
        (["cluster=single", "train_vqvae.steps=9"], ["seed=1"], []),
    ],
    ids=lambda value: " ".join(value) or "none",
)
def test_unasked_changes_are_those_that_no_override_names(current_project, before, after, keys):
    """Dataset and preset count, whether they return to the default or to a value of the preset."""
    assert unasked(before, after) == keys


def test_edits_of_params_yaml_are_not_dropped_unasked(current_project):
    """An edited dataset is the user's choice as well. An edit of conf/ asks for its own change."""
    config.run([], write=True)
    Path("conf/dataset/emoji.yaml").write_text(Path("conf/dataset/emoji.yaml").read_text().replace("crop", "pad"))
    assert unasked_changes(params.read(), compose_params(["seed=1"])) == []
    current_project.edit(lambda data: data["dataset"].update(source="data/my photos"))
    with pytest.raises(UserError) as caught:
        require_asked(compose_params(["seed=1"]), ["exp", "run", "--temp", "-S", "seed=1", "shard"])
    fix = caught.value.fix
    assert """-S 'dataset.source="data/my photos"' -S dataset.resize_mode=crop --temp -S seed=1 shard\n""" in fix
    assert "To change them: dvc exp run -S dataset=emoji --temp -S seed=1 shard" in fix and caught.value.code == 2


@pytest.mark.slow
def test_refused_experiment_leaves_the_project_as_it_was(tmp_path: Path):
    """In the workspace, in a temporary copy and in the queue; experiments that name their choices run."""
    project = CommandLineProject.of_working_tree(tmp_path / "project")
    project.call("git", "config", "user.name", "test")
    project.call("git", "config", "user.email", "test@localhost")
    project.call("vqvae2", "config", SMOKE, "cluster=local", "--write")
    file, versions_stage = project.folder / "params.yaml", "result_versions"
    before = file.read_bytes()
    for place in ((), ("--temp",), ("--queue",)):
        done = project.call("dvc", "exp", "run", *place, "-S", "seed=1", versions_stage, status=2)
        assert 'experiment "smoke" -> "emoji32"' in done.output and "Traceback" not in done.output
        command = " ".join(("dvc exp run -S experiment=smoke", *place, "-S seed=1 result_versions"))
        assert f"To keep them: {command}\n" in done.output
        assert file.read_bytes() == before
    done = project.call("dvc", "exp", "run", "--queue", "-S", SMOKE, "-S", "train_vqvae.steps=some", status=2)
    assert "error: train_vqvae.steps must be a valid integer" in done.output and "Traceback" not in done.output
    assert "No experiment" in project.call("dvc", "queue", "status").output

    first = project.call("dvc", "exp", "run", "-S", SMOKE, "-S", "seed=1", versions_stage)
    assert "Changes against" not in first.output  # there was no run before
    second = project.call("dvc", "exp", "run", "--temp", "-S", SMOKE, "-S", "seed=2", versions_stage)
    assert "Changes against the last run:\n  seed 1 -> 2\n" in second.output
    note = project.run("--dry-run").output
    assert "differs" not in note and "back to conf" not in note
    # Settings that come from elsewhere, such as Git, are used by `dvc repro` as they are.
    project.call("git", "checkout", "params.yaml")
    third = project.call("dvc", "repro", versions_stage)
    assert third.output.index("dataset.image_size 16 -> 32") < third.output.index('experiment "smoke" -> "emoji32"')
