"""dvc.yaml lists every setting, path and result version that a stage depends on."""

import importlib
import inspect
from pathlib import Path

import pytest

from pipeline import dvc_yaml, params, result_versions, stage_runner
from pipeline.compose import compose_params
from pipeline.conflicts import stage_names
from stages.formats.flatten import flatten

ROOT = Path(__file__).parents[2]
DATA = params.read(ROOT / "params.yaml")
ALL_DATA = compose_params(["+critic=small"], ROOT / "conf")  # with the stages that are absent by default
SETTINGS = params.check(ALL_DATA)
STAGES = dvc_yaml.stages(ALL_DATA, ROOT / "dvc.yaml")
KEYED = ("prior", "classifier", "reject")  # run once per entry of a section
ENTRIES = {name: entry.get("do", entry) for name, entry in params.read(ROOT / "dvc.yaml")["stages"].items()}


def signature(stage: dvc_yaml.Stage) -> inspect.Signature:
    return inspect.signature(importlib.import_module(f"stages.{stage.module}").run)


@pytest.mark.parametrize("name", STAGES)
def test_settings_of_a_stage_are_its_params_in_dvc_yaml(name: str):
    """A stage's keyword-only parameters are its `params:`, the context aside."""
    stage = STAGES[name]
    keywords = {p.name for p in signature(stage).parameters.values() if p.kind is p.KEYWORD_ONLY}
    sections = {stage_runner.PARAMETERS.get(key.partition(".")[0], key) for key in stage.params}
    assert keywords - {"context"} == sections


@pytest.mark.parametrize("name", STAGES)
def test_paths_of_a_stage_are_those_in_dvc_yaml(name: str):
    """A stage's positional parameters can all be filled from dvc.yaml, and it uses every artifact that it lists."""
    stage = STAGES[name]
    function = importlib.import_module(f"stages.{stage.module}").run
    arguments = stage_runner.positionals(function, stage, SETTINGS)
    paths = {str(Path(path).relative_to(Path.cwd())) for path in arguments if isinstance(path, Path)}
    folders = {str(Path(path).parent) for path in stage.plots}
    assert len(folders) <= 1  # a stage gets the folder of its plots
    expected = {*stage.artifacts, *stage.outs, *stage.metrics, *folders}
    assert paths == (expected | {SETTINGS.dataset.source} if name == "shard" else expected)


@pytest.mark.parametrize("name", sorted(ENTRIES.keys() - {dvc_yaml.VERSIONS_STAGE}))
def test_stage_depends_on_its_result_version_and_on_no_source_file(name: str):
    """A project without source files follows the installed code; a comment reruns nothing."""
    key = f"{name}_${{key}}" if name in KEYED else name
    assert {result_versions.FILE.as_posix(): [key]} in ENTRIES[name]["params"]
    assert not [path for path in ENTRIES[name]["deps"] if path.endswith(".py") or path.startswith(("stages", "models"))]


def test_result_versions_are_written_each_time():
    """Every `dvc repro` begins with them; they are no file of the cache."""
    entry = ENTRIES[dvc_yaml.VERSIONS_STAGE]
    assert entry["always_changed"] and entry["cmd"] == "exec vqvae2 versions --write"
    assert entry["outs"] == [{result_versions.FILE.as_posix(): {"cache": False}}]


def test_no_stage_depends_on_the_cluster():
    """Another cluster reruns nothing."""
    assert not any("cluster" in stage.params for stage in STAGES.values())


def test_every_stage_can_have_its_own_cluster_settings():
    """cluster.stages accepts each kind of stage, each stage by its name in commands, and no others."""
    expected = {stage.module for stage in STAGES.values()} | {stage.cli_name for stage in STAGES.values()}
    assert set(stage_names(SETTINGS)) == expected | {"classifier_accepted"}  # which these settings do not have


def test_every_level_has_a_prior():
    """dvc.yaml has one prior per level of params.yaml."""
    assert [stage.key for stage in STAGES.values() if stage.module == "prior"] == list(SETTINGS.vqvae.levels)


def test_project_that_does_not_ask_has_no_stage_with_a_classifier():
    """The default settings give the stages of a project without classes."""
    names = list(dvc_yaml.stages(DATA, ROOT / "dvc.yaml"))
    assert names == ["shard", "vqvae", "codes", "prior@top", "prior@bottom", "sample", "evaluate"]


def test_no_setting_has_a_name_that_dvc_ignores():
    """DVC leaves these keys out of the keys of its run cache: another value would restore the old result."""
    for key in flatten(ALL_DATA):
        assert not {"size", "nfiles", "isexec"} & set(key.split(".")), key


@pytest.mark.parametrize("name", sorted(ENTRIES.keys() - {dvc_yaml.VERSIONS_STAGE}))
def test_stage_replaces_the_shell_that_dvc_starts(name: str):
    """A shell between them would outlive a killed DVC, and a second stage could start beside the first."""
    assert ENTRIES[name]["cmd"].startswith(f"exec vqvae2 stage {name}")
