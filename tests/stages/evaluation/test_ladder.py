"""Quality ladder: rungs, metrics and advice."""

from dataclasses import replace

import numpy as np
import pytest

from stages.config import EvaluateConfig
from stages.evaluation import ladder
from stages.evaluation.inputs import EvaluationPlan
from stages.metrics.networks import Network

LEVELS = ("top", "middle", "bottom")
NETWORK = Network("network", "installed", "0" * 64)
PLAN = EvaluationPlan(("validation",), {}, 40, 40, 8, 40, 20, LEVELS[1:], (NETWORK,), EvaluateConfig(), 0)


def test_each_rung_adds_one_model():
    """Priors are added from the finest level to the coarsest; the labels say which codes are real."""
    assert ladder.rungs(LEVELS) == {
        "originals": "",
        "reconstructions": "vqvae",
        "redrawn_bottom": "prior_bottom",
        "redrawn_middle": "prior_middle",
        "samples": "prior_top",
        "random_codes": "",
    }
    assert ladder.labels(LEVELS)["redrawn_middle"] == "real top; drawn middle, bottom"
    assert list(ladder.rungs(("only",))) == ["originals", "reconstructions", "samples", "random_codes"]


def test_step_of_the_worst_model_is_the_largest():
    """Features that move away at one rung give that model the largest step, and the advice names it."""
    generator = np.random.default_rng(0)
    shift = {"reconstructions": 0.1, "redrawn_bottom": 0.2, "redrawn_middle": 2.0, "samples": 2.1, "random_codes": 4.0}

    def features(image_set: str) -> np.ndarray:
        return generator.normal(size=(40, 6)) + shift.get(image_set, 0.0)

    metrics = ladder.metrics(features, PLAN, LEVELS, NETWORK)
    steps = metrics["steps"]
    assert list(steps) == ["vqvae", "prior_bottom", "prior_middle", "prior_top"]
    assert max(steps, key=lambda name: steps[name]["kid_increase"]) == "prior_middle"
    total = metrics["samples"]["kid_network"] - metrics["originals"]["kid_network"]
    assert sum(step["kid_increase"] for step in steps.values()) == pytest.approx(total)
    assert {metrics[name]["images"] for name in ladder.rungs(LEVELS)} == {20}
    assert ladder.advice(steps).startswith("The prior of level middle loses most (KID +")


def test_advice_names_the_vqvae_and_leaves_out_what_is_not_significant():
    """A step below twice its standard error gives no advice about its model, even if it is the largest."""
    steps = {"vqvae": {"kid_increase": 0.3, "kid_increase_se": 0.1}, "prior_top": {"kid_increase": 0.1}}
    assert "The VQ-VAE loses most (KID +0.3000 of +0.4000)" in ladder.advice(steps)
    steps["prior_top"] = {"kid_increase": 0.4, "kid_increase_se": 0.3}
    assert "The VQ-VAE loses most (KID +0.3000 of +0.7000)" in ladder.advice(steps)
    assert "No model" in ladder.advice({"vqvae": {"kid_increase": 0.1, "kid_increase_se": 0.1}})
    assert ladder.advice({}) == ""


def test_ladder_of_zero_images_is_left_out():
    """Without images no features are read."""
    assert ladder.metrics({}.__getitem__, replace(PLAN, num_ladder=0), LEVELS, NETWORK) == {}


def test_redrawn_levels_follow_the_rule_of_the_samples():
    """The sampling rule is read from the metadata of the samples, without other facts."""
    config = ladder.sampling_config({"count": 9, "temperature": 0.7, "top_k": 3, "top_p": 0.9, "accepted": 1.0}, 5)
    assert (config.temperature, config.top_k, config.top_p, config.batch_size) == (0.7, 3, 0.9, 5)


def test_samples_of_other_classes_give_no_step_of_their_prior():
    """A missing class looks like a bad prior, which longer training would not change."""
    features = np.random.default_rng(0).normal(size=(40, 6))
    metrics = ladder.metrics(lambda image_set: features, PLAN, LEVELS, NETWORK, same_classes=False)
    assert list(metrics["steps"]) == ["vqvae", "prior_bottom", "prior_middle"]
    halves = np.arange(100) % 2
    assert ladder.have_same_classes(halves, np.arange(90) % 2) and ladder.have_same_classes(halves[:1], halves[:1])
    assert not ladder.have_same_classes(np.zeros(100, np.int64), halves)
