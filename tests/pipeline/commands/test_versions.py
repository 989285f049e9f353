"""Tests of `vqvae2 versions`: recording versions in the committed table."""

import json
from pathlib import Path

import pytest

from pipeline import stage_source
from pipeline.commands import same_results, versions
from stages.errors import UserError


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table in a copy of the repository whose source of the VQ-VAE it does not know."""
    path = tmp_path / "known_versions.json"
    contents = stage_source.read_table()
    contents["versions"]["vqvae"] = {"0123456789abcdef": {"version": "0123456789abcdef", "reason": "First version."}}
    path.write_text(json.dumps(contents))
    monkeypatch.setattr(stage_source, "TABLE", path)
    return path


def test_new_version_is_the_hash_of_the_source(table: Path, current_project):
    """So branches that record versions apart from each other never record the same one by accident."""
    assert versions.record(same_as="", reason="Another decay.") == 0
    digest = stage_source.source_of_key("vqvae").hash
    entry = json.loads(table.read_text())["versions"]["vqvae"][digest]
    assert entry == {"version": digest, "reason": "Another decay."}


def test_recording_a_version_keeps_results_that_were_computed_before_it(table: Path, current_project):
    """A hash that is not in the table is the version that will be recorded."""
    before = stage_source.source_of_key("vqvae")
    assert not before.is_recorded
    versions.record(same_as="", reason="Another decay.")
    after = stage_source.source_of_key("vqvae")
    assert after.is_recorded and after.version == before.version


def test_equal_results_keep_the_version_of_the_revision(table: Path, current_project, monkeypatch):
    """The smoke pipeline is compared first."""
    compared = []
    monkeypatch.setattr(same_results, "versions_at", lambda revision, keys: dict.fromkeys(keys, "0123456789abcdef"))
    monkeypatch.setattr(same_results, "require_equal", compared.append)
    versions.record(same_as="HEAD", reason="Renamed a layer.")
    assert compared == ["HEAD"]
    assert stage_source.source_of_key("vqvae").version == "0123456789abcdef"


def test_version_is_not_recorded_outside_of_a_clone(tmp_path: Path, monkeypatch):
    """An installed package must not rewrite its own files."""
    monkeypatch.setattr(stage_source, "ROOT", tmp_path)
    with pytest.raises(UserError, match="can only be written in a clone"):
        versions.record(same_as="", reason="Another decay.")


def test_reason_is_required(current_project):
    """A version without one says nothing to the reader of the table."""
    with pytest.raises(UserError, match="--reason is missing"):
        versions.record(same_as="", reason="")
