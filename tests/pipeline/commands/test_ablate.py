"""Tests of `vqvae2 ablate`."""

from pathlib import Path

import pytest

from pipeline.commands import ablate
from stages.errors import UserError


def test_project_without_git_is_refused_at_once(current_project):
    """Experiments are Git commits; the fix is the command that makes the first one."""
    with pytest.raises(UserError, match="git init") as caught:
        ablate.run([], overrides=[], steps=None, out=Path("out"), dry_run=True)
    assert caught.value.code == 3
