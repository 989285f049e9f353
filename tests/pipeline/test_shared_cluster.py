"""Tests of the cluster that the stages of one run share."""

import json
import socket
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from pipeline import shared_cluster
from stages.errors import UserError


def test_long_temporary_folder_is_avoided(tmp_path, monkeypatch):
    """The path of a Unix socket is limited to about 100 characters."""
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with shared_cluster.SharedCluster() as cluster:
        assert cluster.exit_status() == 0 and cluster.folder.is_dir()
    assert not cluster.folder.exists()


@contextmanager
def slow_cluster(monkeypatch, delay_s):
    """Answer the request of a stage after a delay, as a cluster that starts slowly."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, socket.socket(socket.AF_UNIX) as server:
        server.bind(str(Path(folder, "cluster")))
        server.listen()
        monkeypatch.setenv(shared_cluster.FOLDER, folder)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)

        def serve():
            connection, _ = server.accept()
            time.sleep(delay_s)
            with connection, suppress(BrokenPipeError):  # the stage has given up
                connection.sendall(json.dumps({"RAY_ADDRESS": "host:1"}).encode())

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join()


def test_slow_start_of_the_cluster_is_announced(monkeypatch, capsys):
    """The line states what the stage waits for, and for how long."""
    with slow_cluster(monkeypatch, 0.3):
        environment = shared_cluster.cluster_environment(message_after_s=0.1, timeout_s=20)
    assert environment == {"RAY_ADDRESS": "host:1"}
    assert capsys.readouterr().err == "waiting for the Ray cluster to start, for at most 20 s\n"


def test_wait_for_the_cluster_is_bounded(monkeypatch):
    """A cluster that hangs while it starts ends the stage with an error."""
    with (
        slow_cluster(monkeypatch, 0.5),
        pytest.raises(UserError, match="has not started in time"),
    ):
        shared_cluster.cluster_environment(message_after_s=0.1, timeout_s=0.2)
