"""Fingerprints of results."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import models.config
import stages.config
from models.config import EXECUTION, NEUTRAL, plain_settings
from pipeline import dvc_yaml, params
from pipeline.fingerprint import fingerprint_of, identify
from stages.config import Params, TrainConfig
from stages.errors import UserError
from stages.formats import artifact


@pytest.fixture
def folder(current_project):
    """The current folder: a project with shards."""
    write_shards(b"images")
    return current_project


def write_shards(data: bytes) -> None:
    with artifact.commit_folder(Path("artifacts/shards"), "shards", {}) as shards:
        (shards / "train-00000.tar").write_bytes(data)


def fingerprint(stage: str = "vqvae") -> str:
    return identify(dvc_yaml.find(stage, dvc_yaml.stages(params.read())), params.load())[1]


def test_fingerprint_follows_the_settings_of_its_stage_alone(folder):
    """The cluster and other stages' settings do not matter."""
    before = fingerprint()
    folder.edit(lambda data: data["cluster"].update(workers=2, cpus_per_worker=1.0))
    folder.edit(lambda data: data["cluster"].update(workers=[1, 8]))
    folder.edit(lambda data: data["cluster"].update(stages={"vqvae": {"workers": 1}, "shard": {"max_failures": 0}}))
    folder.edit(lambda data: data["sample"].update(count=3))
    assert fingerprint() == before
    folder.edit(lambda data: data["vqvae"]["quantizer"].update(beta=0.5))
    assert fingerprint() != before


def test_fingerprint_follows_every_byte_of_its_inputs(folder):
    """One changed byte is another input."""
    before = fingerprint()
    write_shards(b"imagez")
    assert fingerprint() != before


def test_missing_input_is_refused_and_its_producer_named(folder):
    """The fix is a command to type."""
    with pytest.raises(UserError, match="codes reads artifacts/vqvae, which does not exist") as error:
        fingerprint("codes")
    assert error.value.fix == "Run: vqvae2 run --stage vqvae"


EXECUTION_SETTINGS = {"TrainConfig.microbatch", "TrainConfig.recompute_activations"}
TRAIN = TrainConfig(steps=20, batch_size=8, optimizer="muon")
OTHER_VALUES = {  # of each setting of a training
    "steps": 21,
    "batch_size": 9,
    "optimizer": "adamw",
    "weight_decay": 0.1,
    "muon_scale": 0.3,
    "learning_rate": 1e-3,
    "lr_schedule": "cosine",
    "warmup_steps": 3,
    "max_grad_norm": 1.0,
    "ema_decay": 0.5,
    "precision": "bfloat16",
    "microbatch": 2,
    "recompute_activations": True,
    "compile": True,
    "log_every": 11,
    "evaluate_every": 11,
    "evaluate_images": 11,
    "checkpoint_every": 11,
    "keep_checkpoints": 3,
}


def with_training(settings: Params, train: TrainConfig) -> Params:
    """Return settings whose trainings of the VQ-VAE and of the priors are other ones."""
    priors = {level: dataclasses.replace(prior, train=train) for level, prior in settings.priors.items()}
    return dataclasses.replace(settings, train_vqvae=train, priors=priors)


def test_settings_of_the_execution_are_named():
    """One that is marked by mistake would continue a training, or keep a result, of another value."""
    classes = [item for module in (models.config, stages.config) for item in vars(module).values()]
    marked = {
        f"{item.__name__}.{setting.name}"
        for item in classes
        if isinstance(item, type) and dataclasses.is_dataclass(item)
        for setting in dataclasses.fields(item)
        if EXECUTION in setting.metadata
    }
    assert marked == EXECUTION_SETTINGS


@pytest.mark.parametrize("stage_name", ["vqvae", "prior_top"])
@pytest.mark.parametrize("name", [setting.name for setting in dataclasses.fields(TrainConfig)])
def test_fingerprint_follows_every_setting_of_a_training_but_the_execution(current_project, stage_name, name):
    """Another value of an execution setting changes no result, so an interrupted training continues with it."""
    settings = params.load()
    stage = dvc_yaml.find(stage_name, dvc_yaml.stages(params.read()))
    other = dataclasses.replace(TRAIN, **{name: OTHER_VALUES[name]})
    before, after = (fingerprint_of(stage, with_training(settings, train), {}, "version") for train in (TRAIN, other))
    assert getattr(other, name) != getattr(TRAIN, name)
    assert (before == after) == (f"TrainConfig.{name}" in EXECUTION_SETTINGS)


@dataclass(frozen=True)
class Settings:
    """Settings of a later release."""

    steps: int = 5
    microbatch: int = field(default=0, metadata={NEUTRAL: 0})


def test_setting_added_later_counts_only_beside_its_neutral_value():
    """A release that adds a setting keeps the results of the release before."""
    assert plain_settings({"train": Settings()}) == {"train": {"steps": 5}}
    assert plain_settings(Settings(microbatch=8)) == {"steps": 5, "microbatch": 8}
