"""The committed table of result versions is that of the code."""

import pytest

from pipeline import code_version


@pytest.mark.parametrize("key", code_version.table_keys())
def test_table_knows_the_code_of_every_stage(key: str):
    """A change of what a stage computes gets a new version; any other change proves that it computes the same."""
    code = code_version.code_of(*key.split("."))
    changed = ", ".join(code_version.changed_definitions(code.definitions)) or "what it uses"
    assert isinstance(code.version, int), (
        f"The code of stage {key} changed: {changed}.\n"
        f"If it computes something else: vqvae2 versions --new {key} --reason TEXT\n"
        f"If it computes the same, prove it: vqvae2 versions --same-as HEAD --reason TEXT"
    )


def test_table_has_no_definition_that_no_stage_uses():
    """The table is written as a whole, so it names the definitions of the code as it is."""
    names = {name for key in code_version.table_keys() for name in code_version.code_of(*key.split(".")).definitions}
    assert code_version.read_table()["definitions"].keys() == names
