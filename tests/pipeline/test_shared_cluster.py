"""Tests of the cluster that the stages of one run share."""

import tempfile

from pipeline import shared_cluster


def test_long_temporary_folder_is_avoided(tmp_path, monkeypatch):
    """The path of a Unix socket is limited to about 100 characters."""
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with shared_cluster.SharedCluster() as cluster:
        assert cluster.exit_status() == 0 and cluster.folder.is_dir()
    assert not cluster.folder.exists()
