"""Fingerprints of results."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from models.config import NEUTRAL, plain_settings
from pipeline import dvc_yaml, params
from pipeline.fingerprint import identify
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


@dataclass(frozen=True)
class Settings:
    """Settings of a later release."""

    steps: int = 5
    microbatch: int = field(default=0, metadata={NEUTRAL: 0})


def test_setting_added_later_counts_only_beside_its_neutral_value():
    """A release that adds a setting keeps the results of the release before."""
    assert plain_settings({"train": Settings()}) == {"train": {"steps": 5}}
    assert plain_settings(Settings(microbatch=8)) == {"steps": 5, "microbatch": 8}
