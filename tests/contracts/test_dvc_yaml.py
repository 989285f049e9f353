"""dvc.yaml against the code: a setting or a file that changes results but not the lock is DVC's quietest failure."""

import importlib
import inspect
from pathlib import Path

import pytest

from pipeline import dvc_yaml, params, stage_runner

ROOT = Path(__file__).parents[2]
SETTINGS = params.load(ROOT / "params.yaml")
STAGES = dvc_yaml.stages(params.read(ROOT / "params.yaml"), ROOT / "dvc.yaml")


def signature(stage: dvc_yaml.Stage) -> inspect.Signature:
    return inspect.signature(importlib.import_module(f"stages.{stage.module}").run)


@pytest.mark.parametrize("name", STAGES)
def test_the_settings_a_stage_takes_are_those_dvc_watches(name):
    """A stage's keyword parameters are its `params:` in dvc.yaml, `run` aside."""
    stage = STAGES[name]
    taken = {p.name for p in signature(stage).parameters.values() if p.kind is p.KEYWORD_ONLY}
    watched = {"prior" if key == f"priors.{stage.level}" else key for key in stage.params}
    assert taken - {"run"} == watched


@pytest.mark.parametrize("name", STAGES)
def test_the_paths_a_stage_takes_are_those_dvc_knows(name):
    """A stage's positional parameters can all be filled from dvc.yaml, and no artifact it lists goes unused."""
    stage = STAGES[name]
    function = importlib.import_module(f"stages.{stage.module}").run
    given = stage_runner.positionals(function, stage, SETTINGS)
    paths = {str(Path(path).relative_to(Path.cwd())) for path in given if isinstance(path, Path)}
    expected = {*stage.artifacts, *stage.outs, *stage.metrics, *stage.plots}
    assert paths == (expected | {SETTINGS.dataset.source} if name == "shard" else expected)


def test_every_dependency_exists():
    """Every file of code in dvc.yaml is there."""
    for stage in STAGES.values():
        for path in stage.code:
            assert (ROOT / path).exists(), f"{stage.name} depends on {path}"


def test_where_a_stage_runs_is_nobodys_dependency():
    """Changing `cluster` reruns nothing."""
    assert not any("cluster" in stage.params for stage in STAGES.values())


def test_there_is_a_prior_for_each_level():
    """dvc.yaml grows one prior per level of params.yaml."""
    assert [stage.level for stage in STAGES.values() if stage.module == "prior"] == list(SETTINGS.vqvae.levels)


def test_no_setting_has_a_name_that_dvc_overlooks():
    """DVC leaves these keys out when it looks a run up in its cache: another value would restore the old result."""
    for key in params.flat(params.read(ROOT / "params.yaml")):
        assert not {"size", "nfiles", "isexec"} & set(key.split(".")), key


def test_no_shell_stays_between_dvc_and_a_stage():
    """The stage takes its shell's place; else it would outlive a killed DVC, and a second one start beside it."""
    for name, entry in params.read(ROOT / "dvc.yaml")["stages"].items():
        assert entry.get("do", entry)["cmd"].startswith(f"exec vqvae2 stage {name}")
