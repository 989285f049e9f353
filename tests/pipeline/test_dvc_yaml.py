"""Reader of dvc.yaml."""

import copy
from pathlib import Path

import pytest

from pipeline import dvc_yaml, params
from stages.errors import UserError

ROOT = Path(__file__).parents[2]
SETTINGS = params.load(ROOT / "params.yaml")
STAGES = dvc_yaml.stages(params.read(ROOT / "params.yaml"), ROOT / "dvc.yaml")


def test_stage_is_found_by_either_name():
    """prior_top on the command line is prior@top in DVC."""
    assert dvc_yaml.find("prior_top", STAGES) is dvc_yaml.find("prior@top", STAGES) is STAGES["prior@top"]
    with pytest.raises(UserError) as error:
        dvc_yaml.find("priors", STAGES)
    assert "shard, vqvae, codes, prior_top, prior_bottom, sample, evaluate" in error.value.fix


def test_templates_are_resolved():
    """A prior's stage has its own level's paths and settings."""
    stage = STAGES["prior@top"]
    assert (stage.outs, stage.params) == (("artifacts/priors/top",), ("priors.top", "seed"))
    assert STAGES["shard"].deps == (SETTINGS.dataset.source,)


def test_stages_that_differ_from_the_packages_are_listed():
    """A project keeps the file of the version that made it. Stages of its own and frozen ones are no difference."""
    packaged = params.read(ROOT / "dvc.yaml")
    project = copy.deepcopy(packaged)
    project["stages"] |= {"publish": {"cmd": "true"}, "vqvae": {**project["stages"]["vqvae"], "frozen": True}}
    assert dvc_yaml.differences(project, packaged) == []
    project["stages"]["sample"]["deps"].pop()
    del project["stages"]["evaluate"], project["plots"][0]
    assert dvc_yaml.differences(project, packaged) == ["sample", "evaluate", "plots"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("stages: [1]", "stages must be a mapping"),
        ("stages: {vqvae: 3}", "stages.vqvae must be a mapping"),
        ("stages: {vqvae: {params: 3}}", "stages.vqvae.params must be a mapping"),
        (
            "stages: {vqvae: {params: {params.yaml: [1]}}}",
            "stages.vqvae.params.params.yaml must be a mapping of settings",
        ),
        ("stages: {vqvae: {params: {params.yaml: {1: 2}}}}", "stages.vqvae.params.params.yaml must be a mapping of"),
        ("stages: {vqvae: {outs: {path: a}}}", "stages.vqvae.outs must be a list of entries with a path"),
        ("stages: {vqvae: {deps: [a]}}", "stages.vqvae.deps must be a list of entries with a path"),
        ("stages: {vqvae: {outs: [{path: a, md5: 1}]}}", "stages.vqvae.outs must be a list of entries with a path"),
    ],
)
def test_damaged_dvc_lock_is_refused(tmp_path: Path, monkeypatch, text: str, problem: str):
    """Every reader of its entries may rely on their form."""
    monkeypatch.chdir(tmp_path)
    assert dvc_yaml.read_lock() == {}
    dvc_yaml.LOCK.write_text(text)
    with pytest.raises(UserError) as caught:
        dvc_yaml.read_lock()
    assert caught.value.what.startswith(f"dvc.lock is not valid: {problem}") and caught.value.code == 2


def test_committed_dvc_lock_is_valid():
    """It has every kind of entry that DVC writes."""
    contents = params.read(ROOT / dvc_yaml.LOCK)
    assert dvc_yaml.parse_lock(contents) == contents["stages"]
