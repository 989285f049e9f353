"""Error messages on the terminal and exit statuses."""

import errno
import os
import tempfile
from functools import partial
from pathlib import Path

import pytest
import ray.exceptions

from pipeline.error_report import report
from stages.errors import UserError


def test_unexpected_error_is_one_line_and_a_traceback_in_a_file(tmp_path: Path, capsys):
    """The line names the file."""
    try:
        raise KeyError("middle")
    except KeyError as error:
        assert report(error, tmp_path) == 1
    assert capsys.readouterr().err == f"error: KeyError: 'middle'\n  traceback: {tmp_path}/error.log\n"
    assert "Traceback" in (tmp_path / "error.log").read_text()


def test_traceback_goes_to_the_temporary_folder_if_the_disk_refuses_it(tmp_path: Path, capsys, monkeypatch):
    """A full or read-only disk does not lose the traceback."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert report(KeyError("middle"), tmp_path / "file") == 1
    log = tmp_path / "vqvae2-error.log"
    assert capsys.readouterr().err == f"error: KeyError: 'middle'\n  traceback: {log}\n"
    assert "KeyError" in log.read_text()


@pytest.mark.parametrize("number", [errno.EEXIST, errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT])
def test_path_that_cannot_be_written_is_a_user_error(number: int, tmp_path: Path, capsys):
    """The message names the path and the fix."""
    assert report(OSError(number, os.strerror(number), "samples/000000.png"), tmp_path) == 3
    assert capsys.readouterr().err.startswith(f"error: {os.strerror(number)}.\n  in: samples/000000.png\n  fix: ")


def test_user_error_is_found_inside_the_errors_that_ray_wraps_around_it(tmp_path: Path, capsys):
    """The user reads the error that the worker raised."""
    error = RuntimeError("worker failed")
    error.worker_failures = {0: ValueError("outer")}
    error.worker_failures[0].__cause__ = UserError("The image is blue.", where="7.png", fix="Paint it.", code=4)
    assert report(error, tmp_path) == 4
    assert capsys.readouterr().err == "error: The image is blue.\n  in: 7.png\n  fix: Paint it.\n"


def test_unexpected_error_of_a_worker_keeps_its_own_text(tmp_path: Path, capsys):
    """Ray's text about its processes goes to the file only."""
    error = ray.exceptions.RayTaskError("map", "a traceback", ValueError("the middle is missing"), ip="127.0.0.1")
    assert report(error, tmp_path) == 1
    assert capsys.readouterr().err.startswith("error: ValueError: the middle is missing\n")
    assert "a traceback" in (tmp_path / "error.log").read_text()


@pytest.mark.parametrize("kind", [partial(UserError, where="", fix=""), ValueError])
def test_no_error_shows_a_password(kind, tmp_path: Path, capsys):
    """Neither on the terminal nor in the file, which may also hold bytes that are not UTF-8."""
    error = kind("Nothing answers at s3://me:hunter2@bucket/runs.")
    error.__cause__ = OSError("\udcff.png")
    report(error, tmp_path)
    output = capsys.readouterr().err + "".join(path.read_text() for path in tmp_path.iterdir())
    assert "s3://***@bucket/runs" in output and "hunter2" not in output
