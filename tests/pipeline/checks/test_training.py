"""Tests of the checks of the settings of trainings."""

from dataclasses import replace

import pytest

from pipeline import compose, conf_layers, params
from pipeline.checks import training
from pipeline.checks.check import Request
from stages.config import TrainConfig

STAGES = ("shard", "vqvae", "prior@top", "prior@bottom", "sample")


def test_average_that_keeps_the_first_weights_is_noted(current_project):
    """A preset of thousands of steps, shortened to 60: its moving average is not shortened with it."""
    settings = params.load()
    short = replace(settings.train_vqvae, steps=60, warmup_steps=0, ema_decay=0.995)
    settings = replace(settings, train_vqvae=short)
    answer = training.check_moving_averages(Request(settings, "params.yaml", STAGES))
    assert answer.text == (
        "train_vqvae.ema_decay: 0.995, for 60 steps, leaves the weights of the first step 74% of the saved average"
    )
    assert answer.fix
    assert not training.check_moving_averages(Request(settings, "params.yaml", ("sample",))).fix


def test_weight_of_the_first_step_is_that_of_the_average():
    """The first update copies the weights, and each later one multiplies their share by the decay."""
    config = TrainConfig(steps=3, batch_size=1, ema_decay=0.5)
    assert training.weight_of_first_step(config) == 0.25
    assert training.weight_of_first_step(replace(config, steps=1)) == 1
    assert training.weight_of_first_step(replace(config, ema_decay=0.0)) == 0


@pytest.mark.parametrize("preset", conf_layers.choices(conf_layers.PACKAGED, "experiment"))
def test_presets_train_longer_than_their_averages(preset):
    """No preset of the package gets the note."""
    data = compose.compose_params([f"experiment={preset}", "dataset.source=images"], conf_layers.PACKAGED)
    settings = params.check(data)
    stages = (
        "vqvae",
        *(f"prior@{level}" for level in settings.priors),
        *map("classifier@{}".format, settings.classifiers),
    )
    assert not training.check_moving_averages(Request(settings, preset, stages)).fix
