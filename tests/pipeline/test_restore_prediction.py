"""Prediction of what DVC restores or pulls, compared with what it does."""

import shutil
import subprocess
from contextlib import chdir
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import dvc, dvc_remote, dvc_yaml, params, result_versions
from pipeline.restore_prediction import PULL, RESTORE, RUN, UNCHANGED, Predictor, Remote
from stages.errors import UserError

DVC_YAML = """
stages:
  result_versions:
    cmd: >-
      for name in first second_top second_low third; do echo "$name: 1"; done > result_versions.yaml
    always_changed: true
    outs: [result_versions.yaml: {cache: false}]
  first:
    cmd: mkdir -p artifacts/first && cat source > artifacts/first/file && echo ${a} >> artifacts/first/file
    deps: [source]
    params: [a, result_versions.yaml: [first]]
    outs: [artifacts/first]
  second:
    foreach: ${levels}
    do:
      cmd: mkdir -p artifacts/second/${key} && head -1 artifacts/first/file > artifacts/second/${key}/file
      deps: [artifacts/first]
      params: ["levels.${key}", result_versions.yaml: ["second_${key}"]]
      outs: ["artifacts/second/${key}"]
  third:
    cmd: mkdir -p artifacts/third && cat artifacts/second/*/file > artifacts/third/file
    deps: [artifacts/second]
    params: [b, result_versions.yaml: [third]]
    outs: [artifacts/third]
"""


@dataclass
class Project:
    """A project of four stages in the current folder."""

    settings: SimpleNamespace = field(
        default_factory=lambda: SimpleNamespace(keep_results=(), dataset=SimpleNamespace(source="source"))
    )

    def write(self, a: int = 1, top: int = 1, b: int = 1) -> None:
        Path("params.yaml").write_text(f"a: {a}\nb: {b}\nlevels: {{top: {top}, low: 1}}\n")

    def run(self) -> None:
        subprocess.run([*dvc.COMMAND, "repro", "-q"], check=True)

    def predict(self, remote: Remote | None = None, forced: tuple[str, ...] = (), **options) -> dict[str, str]:
        stages = dvc_yaml.stages(params.read())
        predictor = Predictor(params.read(), self.settings, Path(".dvc/cache"), Path("runs"), remote, **options)
        actions = predictor.predict(stages, dvc.out_of_date_reasons(stages, {}), forced)
        return {dvc_yaml.cli_name(name): action for name, action in actions.items()}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A finished project whose result versions are all 1."""
    monkeypatch.setattr(result_versions, "version_of", lambda stage, settings: 1)
    monkeypatch.setattr(Predictor, "_finished_md5", lambda self, stage: "")
    with chdir(tmp_path):
        subprocess.run([*dvc.COMMAND, "init", "--no-scm", "-q"], check=True)
        Path("dvc.yaml").write_text(DVC_YAML)
        Path("artifacts").mkdir()
        Path("source").write_text("content\n")
        project = Project()
        project.write()
        project.run()
        yield project


def test_return_to_earlier_settings_is_restored(project):
    """The settings of dvc.lock are not those of the run cache's entry, so `dvc repro --dry` cannot tell."""
    assert project.predict() == {}
    project.write(a=2, top=2)
    assert project.predict() == {"first": RUN, "second_top": RUN, "second_low": RUN, "third": RUN}
    project.run()
    project.write()
    restored = {"first": RESTORE, "second_top": RESTORE, "second_low": RESTORE}
    assert project.predict() == {**restored, "third": UNCHANGED}  # its inputs have the same bytes in both runs
    project.write(b=5)
    assert project.predict() == {**restored, "third": RUN}
    assert project.predict(forced=("first",))["first"] == RUN


def test_deleted_outputs_are_restored_and_later_stages_unchanged(project):
    """Nothing but the deleted folder is written."""
    shutil.rmtree("artifacts/first")
    assert project.predict() == {
        "first": RESTORE,
        "second_top": UNCHANGED,
        "second_low": UNCHANGED,
        "third": UNCHANGED,
    }
    Path("source").write_text("other\n")
    assert project.predict()["first"] == RUN


def test_frozen_stage_would_stay_unchanged(project):
    """DVC records its outputs as they are, also with --force. Stages before it may run."""
    Path("dvc.yaml").write_text(DVC_YAML.replace("  first:\n", "  first:\n    frozen: true\n"))
    assert project.predict() == {}
    Path("source").write_text("other\n")
    assert project.predict() == {}
    Path("dvc.lock").unlink()
    assert dvc.out_of_date_reasons(dvc_yaml.stages(params.read()), {})["first"] == [dvc.NOT_RECORDED]
    assert project.predict(forced=("first",)) == {
        "first": UNCHANGED,
        "second_top": RUN,
        "second_low": RUN,
        "third": RUN,
    }


def test_results_that_only_the_remote_has_would_be_pulled(project, tmp_path_factory):
    """Results of dvc.lock, and those that the remote's run cache lists. Without --pull they would run."""
    store = tmp_path_factory.mktemp("store")
    subprocess.run([*dvc.COMMAND, "remote", "add", "-q", "-d", "store", str(store)], check=True)
    subprocess.run([*dvc.COMMAND, "push", "-q", "--run-cache"], check=True)
    shutil.rmtree(".dvc/cache")
    shutil.rmtree("artifacts/second")
    assert set(project.predict().values()) == {RUN}
    remote = Remote(dvc_remote.missing_everywhere())
    assert remote.missing == [] and set(project.predict(remote).values()) == {PULL}
    lock = Path("dvc.lock").read_text()
    Path("dvc.lock").write_text(lock.replace("a: 1", "a: 7"))
    fetched = project.predict(remote, fetch_run_cache=dvc_remote.fetch_run_cache)
    assert fetched["first"] == PULL
    Path("dvc.lock").write_text(lock)
    shutil.rmtree(".dvc/cache")
    shutil.rmtree(store / "files")
    assert set(project.predict(Remote(dvc_remote.missing_everywhere())).values()) == {RUN}


def test_missing_remote_is_reported_in_one_sentence(project):
    """DVC's own message has the path of its configuration."""
    with pytest.raises(UserError, match=r"No DVC remote is configured\.[\s\S]*dvc remote add"):
        dvc_remote.missing_everywhere()


def test_silent_remote_is_not_waited_for(project, monkeypatch):
    """The error says how long was waited."""
    monkeypatch.setattr(dvc, "COMMAND", ["sh", "-c", "sleep 60"])
    monkeypatch.setattr(dvc_remote, "TIMEOUT_S", 0.2)
    with pytest.raises(UserError, match=r"did not answer within 0 s"):
        dvc_remote.missing_everywhere()


@pytest.mark.parametrize("text", ["outs: []\n", "outs:\n", "outs: [a]\n", "outs: [{}]\n", "{", "- a\n"])
def test_damaged_record_of_a_tracked_source_is_unknown_content(tmp_path, text):
    """A .dvc file without an output decides nothing: the stage would run."""
    with chdir(tmp_path):
        Path("source.dvc").write_text(text)
        predictor = Predictor({}, SimpleNamespace(), Path("cache"), Path("runs"))
        assert predictor._dependency("source") == ""
