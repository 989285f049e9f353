"""The committed table of result versions is that of the code."""

import pytest

from pipeline import stage_source


@pytest.mark.parametrize("key", stage_source.table_keys())
def test_table_knows_the_code_of_every_stage(key: str):
    """A change of what a stage computes gets a new version; any other change proves that it computes the same."""
    source = stage_source.source_of_key(key)
    changed = ", ".join(stage_source.changed_definitions(source.definitions)) or "a definition was removed"
    assert source.is_recorded, (
        f"The source of stage {key} changed: {changed}.\n"
        f"If it computes something else: vqvae2 versions --new --reason TEXT\n"
        f"If it computes the same: vqvae2 versions --same-as HEAD --reason TEXT"
    )


def test_every_version_is_the_hash_of_the_first_revision():
    """Revisions that compute the same share one version, so a result of the first one stays valid."""
    for key, entries in stage_source.read_table()["versions"].items():
        first_versions = {digest for digest, entry in entries.items() if entry["version"] == digest}
        assert {entry["version"] for entry in entries.values()} == first_versions, key


def test_table_has_no_definition_that_no_stage_uses():
    """The table is written as a whole, so it names the definitions of the code as it is."""
    names: set[str] = set()
    for key in stage_source.table_keys():
        names |= stage_source.source_of_key(key).definitions.keys()
    assert stage_source.read_table()["definitions"].keys() == names
