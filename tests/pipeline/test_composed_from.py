"""Tests of the section of params.yaml that records its composition."""

import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from pipeline import composed_from, params
from pipeline.commands import config
from pipeline.compose import compose_params, to_yaml
from pipeline.params_drift import repeating_overrides

DVC_COMPOSITION = """
import os, sys
from dvc.utils.hydra import compose_and_dump
compose_and_dump("composed.yaml", os.path.abspath("conf"), None, "config", os.getcwd(), sys.argv[1:])
"""
PRESET = """# @package _global_
defaults:
  - override /dataset: folder
  - override /vqvae: smoke

dataset:
  image_size: 16
train_vqvae:
  steps: 300
"""


def test_section_has_the_overrides_as_given(current_project):
    """Overrides with any signs, quotes and interpolations are read back unchanged."""
    overrides = [
        "vqvae=three_level",
        "+prior@priors.middle=pixelcnn",
        "dataset.source='photos (1) # 2'",
        "dataset.name=${dataset.source}",
    ]
    config.run(overrides, write=True)
    assert composed_from.read_overrides() == overrides
    assert composed_from.choices_of(params.read())["vqvae"] == "three_level"
    config.run([], write=True)
    assert composed_from.read_overrides() == []


def test_dvc_composes_the_same_file_from_a_preset_of_the_user(current_project):
    """`dvc exp run` records choices and overrides as vqvae2 does: the next command can repeat them."""
    Path("conf/experiment/mine.yaml").write_text(PRESET)
    overrides = ["experiment=mine", "dataset.source='my photos'", "train_vqvae.learning_rate=1e-5"]
    config.run(overrides, write=True)
    subprocess.run([sys.executable, "-c", DVC_COMPOSITION, *overrides], check=True)
    by_dvc = params.read(Path("composed.yaml"))
    assert by_dvc == params.read() and not composed_from.is_edited(by_dvc)
    assert composed_from.choices_of(by_dvc) == {**composed_from.choices_of(by_dvc), "experiment": "mine"}
    assert params.check(by_dvc).composed_from.overrides == tuple(overrides)


def test_edits_of_the_file_are_recognized_and_repeated(current_project):
    """The recorded overrides and the edits together compose to the same settings."""
    config.run(["experiment=smoke", "seed=3"], write=True)
    assert not composed_from.is_edited(params.read())
    assert repeating_overrides(params.read()) == ["experiment=smoke", "seed=3"]
    current_project.edit(lambda data: data["dataset"].update(source="a b", validation_fraction=1e-7))
    current_project.edit(lambda data: data.update(seed=4))
    assert composed_from.is_edited(params.read())
    overrides = repeating_overrides(params.read())
    assert overrides == ["experiment=smoke", "seed=4", 'dataset.source="a b"', "dataset.validation_fraction=1e-07"]
    composed = compose_params(overrides)
    assert composed_from.settings_of(composed) == composed_from.settings_of(params.read())


def test_file_of_another_origin_counts_as_edited(current_project):
    """A params.yaml without the section, or with a damaged one, is valid and repeated by its values."""
    current_project.edit(lambda data: data.update(seed=5))
    current_project.edit(lambda data: data.pop("composed_from"))
    params.load()
    assert composed_from.is_edited(params.read()) and repeating_overrides(params.read()) == ["seed=5"]


TEXT = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=12) | st.text(
    "ab1.-+/~%#ä \\${}'\",[]()=:|", max_size=8
)


def read_by_hydra(override: str) -> object:
    """Return the value that Hydra reads, with interpolations evaluated."""
    value = OverridesParser.create().parse_override(override).value()
    return OmegaConf.to_container(OmegaConf.create({"value": value, "seed": 5}), resolve=True)["value"]


@settings(max_examples=300, deadline=None)
@given(TEXT | st.lists(TEXT, max_size=3) | st.booleans() | st.none() | st.integers() | st.floats(allow_nan=False))
@example("/tmp/Köln")
@example("${seed}")
@example("a/\\\\${seed}")
@example("\\${seed}")
@example("-5")
@example(".5")
@example("-inf")
@example("1e5")
@example("NULL")
@example("NaN")
@example("true")
@example("-x")
@example("~")
@example("it's")
@example('end\\"')
@example("end\\")
@example(-5)
def test_formatted_override_has_the_same_value(value):
    """Hydra reads back a text, whatever characters it has, a number or a list, with its type."""
    parsed = read_by_hydra(composed_from.format_override("key", value))
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize("value", ["/tmp/Köln", "a/${seed}", "a b", ""])
def test_formatted_override_composes_to_the_same_value(current_project, value):
    """The composed setting and the recorded override are those that were given."""
    override = composed_from.format_override("dataset.name", value)
    data = compose_params([override])
    assert data["dataset"]["name"] == value and composed_from.overrides_of(data) == [override]


@pytest.mark.parametrize(
    ("key", "value"), [("sample.classes", ["a b", "1"]), ("sample.top_p", 0.5), ("augment.flip", False)]
)
def test_formatted_override_keeps_the_type(current_project, key, value):
    """Lists, numbers and booleans are read back as such."""
    assert params.look_up(compose_params([composed_from.format_override(key, value)]), key) == value


def test_no_stage_depends_on_the_section(current_project):
    """Another origin of equal settings reruns nothing."""
    assert composed_from.SECTION not in Path("dvc.yaml").read_text()
    assert to_yaml(compose_params()).startswith("# Composed from conf/")
