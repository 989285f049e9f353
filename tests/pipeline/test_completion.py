"""Tests of shell completion, through the protocol of the shells and of its parts."""

import json
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import pytest

from pipeline import completion

SLOW_LIBRARIES = ("torch", "numpy", "pydantic", "ray", "mlflow", "hydra", "dvc", "rich", "pipeline.params")


def words(project, text: str, shell: str = "bash") -> list[str]:
    """Return what a shell would offer for an unfinished command."""
    parts = text.split(" ")
    request = {"COMP_WORDS": text, "COMP_CWORD": str(len(parts) - 1)} if shell == "bash" else {}
    done = project.command(
        **request,
        _TYPER_COMPLETE_ARGS=text,
        _TYPER_COMPLETE_FISH_ACTION="get-args",
        _VQVAE2_COMPLETE=f"complete_{shell}",
    )
    assert done.stderr == ""
    return done.stdout.split()


def candidates(kind: str, word: str, **options) -> list[str]:
    return completion.complete(kind, word, options)


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_shells_complete_stages_and_settings(project, shell):
    """Bash splits words at `=` and replaces the last part only; other shells replace the whole word."""
    assert words(project, "vqvae2 run --stage prior_t", shell) == ["prior_top"]
    if shell == "bash":
        assert words(project, "vqvae2 run -S seed = 1 -S experiment = sm") == ["smoke"]
    else:
        assert words(project, "vqvae2 run -S experiment=sm", shell) == ["experiment=smoke"]


def test_settings_are_presets_choices_and_keys(current_project):
    """Presets come first. A key is offered with its present value, for editing."""
    assert candidates("setting", "exp")[0] == "experiment=ablation16"
    assert "prior@priors.top=pixelcnn" in candidates("setting", "prior@")
    assert candidates("setting", "priors.top.train.lear") == ["priors.top.train.learning_rate=0.002"]
    assert candidates("setting", "+exp")[0] == "+experiment=ablation16"
    assert candidates("setting", "dataset.labels") == ["dataset.labels=labels.csv"]
    assert candidates("setting", "nothing") == candidates("setting", "composed_from") == []


def test_stages_have_the_names_that_commands_print(current_project):
    """Stages of the levels in params.yaml, not of the file dvc.yaml."""
    stages = ["shard", "vqvae", "codes", "prior_top", "prior_bottom", "sample", "evaluate"]
    assert candidates("stage", "") == stages


def test_classes_are_those_of_the_model(tmp_path: Path):
    """Also of another folder given as --model before."""
    for name, classes in (("artifacts", ["food", "flags"]), ("other", ["dogs"])):
        (tmp_path / name / "vqvae").mkdir(parents=True)
        (tmp_path / name / "vqvae" / "manifest.json").write_text(json.dumps({"meta": {"classes": classes}}))
    with chdir(tmp_path):
        assert candidates("class", "f") == ["food", "flags"]
        assert candidates("class", "", model="other") == ["dogs"]


def test_runs_are_experiments_references_and_tracked_runs(tmp_path: Path):
    """DVC keeps an experiment as a Git reference; its internal references are not offered."""
    journal = tmp_path / "runs" / "pipeline" / "20260101-000000-abcdef" / "journal.jsonl"
    journal.parent.mkdir(parents=True)
    journal.touch()
    with chdir(tmp_path):
        git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run([*git, "init", "-q", "-b", "trunk"], check=True)
        subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
        for reference in ("refs/tags/v1", "refs/exps/ab/cdef/lumpy-bird", "refs/exps/exec/EXEC_HEAD"):
            subprocess.run([*git, "update-ref", reference, "HEAD"], check=True)
        assert set(candidates("run", "")) == {"lumpy-bird", "v1", "trunk", "20260101-000000-abcdef"}


@pytest.mark.parametrize("kind", sorted(completion.SOURCES.keys() - {"preset"}))  # presets are files of the package
def test_completion_is_silent_outside_of_a_project(kind, tmp_path: Path, capfd):
    """A message would appear in the middle of the command line."""
    with chdir(tmp_path):
        assert candidates(kind, "") == []
    assert capfd.readouterr() == ("", "")


def test_bash_words_are_joined_at_breaks():
    """Only the last part of the unfinished word is left, and the kept part is remembered."""
    for text, index, joined, kept_part in (
        ("vqvae2 run -S experiment = sm", 5, "vqvae2 run -S sm", "experiment="),
        ("vqvae2 run -S experiment =", 4, "vqvae2 run -S ", "experiment="),
        ("vqvae2 run -S prior @ priors.top = p", 7, "vqvae2 run -S p", "prior@priors.top="),
        ("vqvae2 run -S seed = 1 --stage ", 7, "vqvae2 run -S seed=1 --stage ", ""),
        ("vqvae2 s", 1, "vqvae2 s", ""),
    ):
        request = {"COMP_WORDS": text, "COMP_CWORD": str(index)}
        completion.join_bash_words(request)
        assert (request["COMP_WORDS"], request[completion.KEPT_VARIABLE]) == (joined, kept_part), text


def test_completion_imports_no_slow_library(current_project):
    """The user waits for the Tab key."""
    code = "import sys; from pipeline import cli, completion\n"
    code += "for kind in completion.SOURCES: completion.complete(kind, '')\n"
    code += f"print(*(name for name in {SLOW_LIBRARIES!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
