"""Joining a cluster, or being told at once that there is none."""

import socket
import time

import pytest

from stages.config import ClusterConfig
from stages.errors import UserError
from stages.runtime import cluster


@pytest.mark.parametrize("ours", [False, True])
def test_an_address_where_nobody_listens_is_refused_in_seconds(monkeypatch, ours: bool):
    """Ray would try for minutes; the letter names the address, and what to do about a cluster of ours or another's."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    if ours:
        monkeypatch.setenv(cluster.OURS, "1")
    start = time.monotonic()
    with pytest.raises(UserError, match="does not answer") as error, cluster.connected(ClusterConfig()):
        pass
    assert time.monotonic() - start < 10
    assert error.value.where == f"RAY_ADDRESS={address}"
    assert ("same command again" if ours else "unset RAY_ADDRESS") in error.value.fix
