"""Ray's sessions are in a folder whose path is short enough for sockets."""

import sys
from pathlib import Path

import pytest

from stages.errors import UserError
from stages.runtime.ray_sessions import FALLBACK, MAX_LENGTH, sessions_parent

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Ray reads TMPDIR on Linux only")


@linux
def test_long_tmpdir_is_replaced():
    """Cluster schedulers set long ones; the path of a Unix socket has at most 107 bytes, of which Ray needs 68."""
    limit = "/tmp/" + "x" * (MAX_LENGTH - 5)
    assert len(limit) == 39 and sessions_parent({"TMPDIR": limit}) == Path(limit)
    assert sessions_parent({"TMPDIR": f"{limit}x"}) == FALLBACK
    assert sessions_parent({"TMPDIR": "/tmp/" + "é" * 30}) == FALLBACK  # two bytes each
    assert sessions_parent({}) == FALLBACK


def test_long_ray_tmpdir_is_refused():
    """It was chosen for Ray, so it is not replaced."""
    with pytest.raises(UserError, match=r"RAY_TMPDIR must have at most 39 bytes, .* got 104") as caught:
        sessions_parent({"RAY_TMPDIR": "/tmp" + "x" * 100})
    assert caught.value.code == 2 and "shorter path" in caught.value.fix


@linux
def test_folder_that_cannot_be_created_is_refused(tmp_path):
    """The error names the part of the path that exists."""
    (tmp_path / "file").touch()
    link = Path("/tmp") / f"vqvae2-test-{tmp_path.name[:8]}"
    link.unlink(missing_ok=True)
    link.symlink_to(tmp_path)
    try:
        with pytest.raises(UserError, match="Ray cannot write its sessions") as caught:
            sessions_parent({"TMPDIR": f"{link}/file"})
        assert caught.value.where == f"{link}/file" and "RAY_TMPDIR" in caught.value.fix
    finally:
        link.unlink()
