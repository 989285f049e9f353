"""Tests of the checks of what a run connects to."""

import socket
import time
from dataclasses import replace

import pytest

from pipeline import params
from pipeline.checks import servers
from pipeline.checks.check import Answer, Request, result_of
from stages.cluster_config import StageClusterConfig
from stages.errors import UserError


@pytest.fixture
def settings(current_project):
    """The settings of a project that is the current folder."""
    return params.load()


def test_cluster_without_a_token_is_a_warning(monkeypatch, tmp_path):
    """Anyone who reaches its port can run code there. A token counts if Ray sends it."""
    monkeypatch.setattr("stages.runtime.ray_address.check_address", lambda address, **_: address)
    answer = servers.check_ray({"RAY_ADDRESS": "host:6379"})
    assert "no token is sent" in answer.text and "RAY_AUTH_MODE=token" in answer.fix
    assert "no token is sent" in servers.check_ray({"RAY_ADDRESS": "host:6379", "RAY_AUTH_TOKEN": "secret"}).text
    with_mode = {"RAY_ADDRESS": "host:6379", "RAY_AUTH_MODE": "token"}
    assert not servers.check_ray({**with_mode, "RAY_AUTH_TOKEN": "secret"}).fix
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret\n")
    assert not servers.check_ray(with_mode).fix
    assert not servers.check_ray({}).fix


def test_mlflow_server_that_does_not_answer_is_a_warning():
    """Runs continue without it. The password of the address is not shown."""
    answer = servers.check_mlflow({"MLFLOW_TRACKING_URI": "http://me:hunter2@127.0.0.1:9"})
    assert "127.0.0.1:9: MLflow does not answer: Connection refused" in answer.text and "sync-metrics" in answer.fix
    assert "hunter2" not in answer.text


def test_storage_that_does_not_work_is_refused_in_time(settings, tmp_path):
    """One that exists passes; one that is silent is given up after a timeout."""

    def request(url):
        return Request(replace(settings, cluster=replace(settings.cluster, storage=url)), "params.yaml", ())

    assert servers.check_storage(request("")).text.startswith("none")
    (tmp_path / "store").mkdir()
    servers.check_storage(request(f"file://{tmp_path}/store"))
    with pytest.raises(UserError, match="The storage cannot be opened"):
        servers.check_storage(request("nosuch://bucket"))
    of_one = replace(settings.cluster, stages={"vqvae": StageClusterConfig(storage="nosuch://bucket")})
    with pytest.raises(UserError, match="The storage cannot be opened"):
        servers.check_storage(Request(replace(settings, cluster=of_one), "params.yaml", ()))


def test_result_of_a_check_has_no_credentials():
    """Neither the text of an answer nor an error shows the password of a URL."""

    def refuse(url: str) -> Answer:
        raise UserError(f"{url} is wrong.", where=url, fix=f"Change {url}")

    for check in (lambda url: Answer(f"{url} answers", f"Change {url}"), refuse):
        result = result_of("storage", check, "s3://AKIA:hunter2@bucket")
        assert "s3://***@bucket" in result.text and "hunter2" not in result.text + result.fix


def test_slow_call_is_given_up():
    """The error is that of the timeout; an error of the call itself passes."""
    error, start = UserError("No answer.", where="", fix=""), time.monotonic()
    with pytest.raises(UserError, match=r"No answer\."):
        servers.bounded(lambda: time.sleep(30), 0.1, error)
    assert time.monotonic() - start < 5
    with pytest.raises(ZeroDivisionError):
        servers.bounded(lambda: 1 / 0, 5, error)


def test_long_temporary_folder_is_refused_for_loader_processes(settings):
    """Their sockets are in it. Without such processes it does not matter."""
    environment = {"TMPDIR": "/" + "x" * 90}
    servers.check_loader_sockets(Request(settings, "params.yaml", (), environment=environment))
    parallel = replace(settings, cluster=replace(settings.cluster, loader_workers=2))
    with pytest.raises(UserError, match="TMPDIR must have at most 75 bytes") as caught:
        servers.check_loader_sockets(Request(parallel, "params.yaml", (), environment=environment))
    assert "cluster.loader_workers to 0" in caught.value.fix
    of_one = replace(settings.cluster, stages={"vqvae": StageClusterConfig(loader_workers=2)})
    with pytest.raises(UserError, match="TMPDIR must have"):
        servers.check_loader_sockets(Request(replace(settings, cluster=of_one), "p", (), environment=environment))
    with pytest.raises(OSError, match="too long"), socket.socket(socket.AF_UNIX) as server:
        server.bind("/tmp/" + "x" * 103)
