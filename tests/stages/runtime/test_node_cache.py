"""Cache folder of a node: folders of killed processes are removed, those of live ones are not."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from stages.runtime.node_cache import LocalDiskError, claim_folder


def claim_and_die(folder: Path) -> None:
    with claim_folder(folder):
        (folder / "file").write_text("data")
        os.kill(os.getpid(), signal.SIGKILL)


def test_claim_removes_folders_of_killed_processes_only(tmp_path: Path):
    """A folder that a live process claims stays, also if its own process claims it again."""
    with claim_folder(tmp_path / "live"):
        (tmp_path / "live" / "file").write_text("data")
        process = multiprocessing.get_context("fork").Process(target=claim_and_die, args=(tmp_path / "killed",))
        process.start()
        process.join()
        assert (tmp_path / "killed" / "file").exists()
        with claim_folder(tmp_path / "own"):
            assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"live", "own"}
        with claim_folder(tmp_path / "live"):
            assert (tmp_path / "live" / "file").exists()


def test_error_in_a_claim_is_raised_unchanged(tmp_path: Path):
    """Only the folder's own errors are about the node's disk."""
    with pytest.raises(FileNotFoundError, match="elsewhere"), claim_folder(tmp_path / "a"):
        raise FileNotFoundError("elsewhere")
    (tmp_path / "file").touch()
    with pytest.raises(LocalDiskError, match="node cannot write"), claim_folder(tmp_path / "file" / "a"):
        pass
