"""Compute of stages, from the settings."""

from pathlib import Path

from pipeline import dvc_yaml, params
from pipeline.commands.plan import count
from pipeline.compute_facts import compute_facts, forward_flops

ROOT = Path(__file__).parents[2]


def test_facts_of_the_demo():
    """A training has the cost that `vqvae2 plan` shows, its data and its settings; other stages have devices only."""
    data = params.read(ROOT / "params.yaml")
    settings = params.check(data)
    stages = dvc_yaml.stages(data, ROOT / "dvc.yaml")
    facts = {name: compute_facts(dvc_yaml.find(name, stages), settings) for name in ("vqvae", "prior@top", "sample")}
    costs = {training.stage: training.training_flops for training in count(settings, classes=9)}
    assert facts["sample"] == {"device": "CPU", "devices": 2}
    data["cluster"]["stages"] = {"sample": {"workers": 5}}
    assert compute_facts(stages["sample"], params.check(data))["devices"] == 5
    assert facts["vqvae"] == {
        "device": "CPU",
        "devices": 2,
        "images": 64000,
        "flop": costs["vqvae"],
        "batch_size": 32,
        "learning_rate": "0.002, cosine, 50 warm-up steps",
        "augmentation": "flip, shift of up to 1 pixels",
    }
    forward = {training.stage: training.forward_flops for training in count(settings, classes=9)}
    assert forward_flops(facts["vqvae"]) == forward["vqvae"] and forward_flops(facts["sample"]) == 0
    assert facts["prior@top"]["flop"] == costs["prior_top"]
    assert facts["prior@top"]["augmentation"].startswith("4 copies: 1 original, 3 with flip")
