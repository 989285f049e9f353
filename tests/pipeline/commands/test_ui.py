"""Tests of `vqvae2 ui`."""

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import urllib.request
from contextlib import closing

import pytest

from pipeline.commands import ui
from pipeline.commands.ui import open_browser
from pipeline.stage_runner import PICTURES


@pytest.mark.parametrize(
    ("environment", "is_terminal", "opened"),
    [({"DISPLAY": ":0"}, True, ["page"]), ({"WAYLAND_DISPLAY": "w"}, True, ["page"]), ({"DISPLAY": ":0"}, False, [])],
)
def test_browser_opens_for_a_person_with_a_display(environment, is_terminal, opened):
    """A script or a pipe opens none."""
    pages: list[str] = []
    open_browser("page", environment=environment, is_terminal=is_terminal, open_page=pages.append)
    assert pages == opened


@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac always has a display")
def test_no_browser_without_a_display():
    """On a remote machine a text browser would take over the terminal."""
    pages: list[str] = []
    open_browser("page", environment={}, is_terminal=True, open_page=pages.append)
    assert pages == []


def test_address_of_the_database_is_no_argument(tmp_path, monkeypatch):
    """It may hold a password, and every user of a machine sees arguments."""
    started = {}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", lambda arguments, env, **_: started.update(arguments=arguments, env=env))
    ui._start_server("postgresql://user:secret@host/runs", 5000)
    assert not any("secret" in argument for argument in started["arguments"])
    assert started["env"]["MLFLOW_BACKEND_STORE_URI"] == "postgresql://user:secret@host/runs"


def test_pictures_in_mlflow_are_files_of_the_stages(artifacts):
    """The samples and the reconstructions of a run are shown before it is evaluated."""
    for stage, folder in (("vqvae", "vqvae"), ("sample", "samples")):
        assert all(artifacts.path(folder).joinpath(file).is_file() for file in PICTURES[stage].values())


@pytest.mark.slow
def test_ui_prints_pages_and_ends_with_its_server(project):
    """The first page is printed when the server answers; a signal ends the command and the server with status 0."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-c", "from pipeline.cli import main; main()", "ui", "--port", str(port)],
        cwd=project.folder,
        env={**os.environ, **project.environment},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert "Ctrl-C" in process.stdout.readline()
        assert process.stdout.readline().split() == ["no", "runs", "yet", f"http://127.0.0.1:{port}"]
        url = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search?max_results=1"
        with urllib.request.urlopen(url, timeout=10) as answer:
            assert "experiments" in json.load(answer)
    finally:
        process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.slow
def test_server_that_fails_is_reported(project):
    """The error has the reason that MLflow gives, and where all its messages are."""
    with closing(sqlite3.connect(project.folder / "mlflow.db")) as database:
        database.execute("create table experiments (name, lifecycle_stage, experiment_id)")
        database.execute("create table alembic_version (version_num)")
        database.execute("insert into alembic_version values ('of another release')")
        database.commit()
    done = project.command("ui", "--port", "5987")
    assert done.returncode == 3 and "MLflow's server ended with status" in done.stderr
    assert "in: runs/mlflow_server.log" in done.stderr and "Traceback" not in done.stderr
