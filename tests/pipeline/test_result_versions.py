"""The file of result versions that DVC watches, and results that keep_results pins."""

import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from models.config import NEUTRAL
from pipeline import dvc_yaml, params, result_versions
from pipeline.fingerprint import identify
from stages.config import AugmentConfig
from stages.errors import UserError
from stages.formats import artifact
from tests.command_line_project import CommandLineProject

PINNED = "0123456789abcdef"  # a version that no code has


@pytest.fixture
def folder(current_project: CommandLineProject) -> CommandLineProject:
    """The current folder: a project whose dvc.lock records a result of the VQ-VAE by other code."""
    data = params.read()
    recorded = {key: data[key] for key in ("vqvae", "augment", "train_vqvae", "seed")}
    entry = {"params": {"params.yaml": recorded, result_versions.FILE.as_posix(): {"vqvae": PINNED}}}
    YAML(typ="safe", pure=True).dump({"schema": "2.0", "stages": {"vqvae": entry}}, Path("dvc.lock"))
    return current_project


def write() -> dict[str, Any]:
    data = params.read()
    versions = result_versions.compute(data, params.check(data))
    result_versions.write(versions)
    return versions


def pin(folder: Any, *names: str) -> None:
    folder.edit(lambda data: data.update(keep_results=list(names)))


def test_file_has_a_version_for_every_stage(folder):
    """DVC reads the file as YAML; a second writing of the same versions leaves it untouched."""
    versions = write()
    names = [stage.cli_name for stage in dvc_yaml.stages(params.read()).values()]
    assert list(versions) == names
    assert YAML(typ="safe").load(result_versions.FILE) == versions
    before = result_versions.FILE.stat().st_mtime_ns
    write()
    assert result_versions.FILE.stat().st_mtime_ns == before


def test_changed_file_of_a_feature_network_changes_the_version_of_evaluate(folder):
    """DVC then runs it again, and says why. Other stages, and the installed network, have the version of the source."""
    before = write()
    folder.edit(lambda data: data["evaluate"]["networks"].update(mine="mine.pt"))
    versions = []
    for contents in (None, b"one", b"other", b"one"):
        if contents is not None:
            Path("mine.pt").write_bytes(contents)
        versions.append(write())
    assert all(re.fullmatch(rf"{before['evaluate']}\+\w{{8}}", version["evaluate"]) for version in versions)
    missing, first, second, first_again = (version["evaluate"] for version in versions)
    assert first == first_again and len({missing, first, second}) == 3
    assert versions[0] | {"evaluate": ""} == before | {"evaluate": ""}
    assert result_versions.describe_change(first, second) == "a file of evaluate.networks changed"
    assert "code" in result_versions.describe_change(first, f"{PINNED}+{first[-8:]}")


def test_pinned_stage_has_the_version_of_its_result(folder):
    """DVC sees no change, and neither does the fingerprint that names the stage's state in runs/."""
    with artifact.commit_folder(Path("artifacts/shards"), "shards", {}):
        pass
    stage = dvc_yaml.find("vqvae", dvc_yaml.stages(params.read()))
    fingerprint = identify(stage, params.load())[1]
    assert write()["vqvae"] != PINNED
    pin(folder, "vqvae")
    assert write()["vqvae"] == PINNED
    assert identify(stage, params.load())[1] != fingerprint


def test_pinned_stage_is_refused_when_it_is_to_run(folder):
    """Its result would be the other code's; the message names both versions."""
    stage = dvc_yaml.find("vqvae", dvc_yaml.stages(params.read()))
    result_versions.require_not_pinned(stage, params.load())
    pin(folder, "vqvae")
    with pytest.raises(UserError, match=f"vqvae cannot run: keep_results keeps its result of version {PINNED}"):
        result_versions.require_not_pinned(stage, params.load())


def test_changed_settings_of_a_pinned_stage_are_refused_before_dvc_deletes_its_result(folder):
    """dvc.yaml writes the versions before any other stage runs."""
    pin(folder, "vqvae")
    folder.edit(lambda data: data["vqvae"]["quantizer"].update(beta=0.5))
    with pytest.raises(UserError, match=r"settings changed: vqvae.quantizer.beta 0.25 -> 0.5"):
        write()


def test_setting_that_a_release_adds_at_its_neutral_value_is_no_change_of_a_pinned_stage(folder, monkeypatch):
    """Results are as they were without it. Another value than the neutral one is a change."""
    data = params.read()
    lock = params.read(dvc_yaml.LOCK)
    del lock["stages"]["vqvae"]["params"]["params.yaml"]["augment"]["max_shift"]  # as recorded before the release
    YAML(typ="safe", pure=True).dump(lock, dvc_yaml.LOCK)
    field = AugmentConfig.__dataclass_fields__["max_shift"]
    monkeypatch.setattr(field, "metadata", {NEUTRAL: data["augment"]["max_shift"]})
    pin(folder, "vqvae")
    assert write()["vqvae"] == PINNED
    folder.edit(lambda data: data["augment"].update(max_shift=3))
    with pytest.raises(UserError, match=r"settings changed: augment\.max_shift"):
        write()


@pytest.mark.parametrize(
    ("name", "headline"),
    [
        ("codes", "keep_results names codes, which has no finished result to keep."),
        ("prior@top", "keep_results names prior_top, which has no finished result to keep."),
        ("vqvea", "keep_results names 'vqvea', which is not a stage."),
    ],
)
def test_name_that_cannot_be_pinned_is_refused(folder, name: str, headline: str):
    """A stage without a result, and a misspelt one."""
    pin(folder, name)
    with pytest.raises(UserError) as error:
        write()
    assert error.value.what == headline
