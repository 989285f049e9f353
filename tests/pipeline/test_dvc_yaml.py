"""Reader of dvc.yaml."""

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
