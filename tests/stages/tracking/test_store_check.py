"""The MLflow store is checked before a run: each refusal of a server has its own text and fix."""

import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import chdir, closing, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from stages.errors import UserError
from stages.tracking.mlflow_store import database_uri
from stages.tracking.store_check import StoreUnavailableError, check_store, judge_response
from stages.tracking.sync_runs import describe_error, describe_failure, sync_runs

WHERE = "http://***@mlflow.example:5000"
FOUND = {"experiment": {"experiment_id": "7", "name": "vqvae2", "lifecycle_stage": "active"}}
DELETED = {"experiment": FOUND["experiment"] | {"lifecycle_stage": "deleted"}}
UNKNOWN = {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "Could not find experiment"}


@contextmanager
def server(status: int, text: str) -> Iterator[tuple[str, list[str]]]:
    """Answer every request alike. Yield the address and the list of authorizations that clients send."""
    authorizations: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            authorizations.append(self.headers.get("Authorization", ""))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{http.server_port}", authorizations
        http.shutdown()


@pytest.mark.parametrize("answer", [(200, FOUND), (404, UNKNOWN)], ids=["exists", "does not exist yet"])
def test_server_with_the_experiment_or_without_is_accepted(answer):
    """A run creates the experiment if there is none."""
    status, body = answer
    judge_response(status, json.dumps(body), "vqvae2", WHERE)


@pytest.mark.parametrize(
    ("status", "text", "message", "fix"),
    [
        (401, "You are not authenticated.", "rejects the user name, password or token", "MLFLOW_TRACKING_USERNAME"),
        (403, "Permission denied", "refuses access to the experiment 'vqvae2'", "MLFLOW_EXPERIMENT_NAME"),
        (
            403,
            "Invalid Host header - possible DNS rebinding attack detected",
            "does not accept requests to this host name",
            "mlflow server --allowed-hosts mlflow.example:5000",
        ),
        (200, json.dumps(DELETED), "experiment 'vqvae2' is deleted", "mlflow experiments restore --experiment-id 7"),
        (200, "<html>Sign in</html>", "not an MLflow server: it answers with HTTP status 200", "MLFLOW_TRACKING_URI"),
        (200, "[]", "not an MLflow server", "MLFLOW_TRACKING_URI"),
        (404, "Not Found", "not an MLflow server: it answers with HTTP status 404", "unset MLFLOW_TRACKING_URI"),
    ],
)
def test_refusal_is_reported_with_its_fix(status, text, message, fix):
    """None of these is "does not answer", and no restart of a server helps."""
    with pytest.raises(UserError, match=message) as caught:
        judge_response(status, text, "vqvae2", WHERE)
    assert fix in caught.value.fix and not isinstance(caught.value, StoreUnavailableError)


def test_server_in_trouble_is_unavailable():
    """A run continues without it."""
    with pytest.raises(StoreUnavailableError, match="HTTP status 503"):
        judge_response(503, "busy", "vqvae2", WHERE)


def test_credentials_are_sent_as_mlflow_sends_them():
    """From variables or from the address; errors have no password."""
    with server(401, "") as (address, authorizations):
        for user, variables in (
            ("", {"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": "hunter2"}),
            ("", {"MLFLOW_TRACKING_TOKEN": "hunter2"}),
            ("me:hunter2@", {}),
        ):
            with pytest.raises(UserError, match="rejects the user name") as caught:
                check_store({"MLFLOW_TRACKING_URI": f"http://{user}{address}", **variables})
            assert "hunter2" not in str(caught.value)
    assert authorizations == ["Basic bWU6aHVudGVyMg==", "Bearer hunter2", "Basic bWU6aHVudGVyMg=="]


def test_authentication_of_plugins_is_not_judged():
    """Only MLflow itself can sign such a request, so the refusal of an unsigned one means nothing."""
    with server(403, "") as (address, _):
        text = check_store({"MLFLOW_TRACKING_URI": f"http://{address}", "MLFLOW_TRACKING_AWS_SIGV4": "true"})
        assert text == f"http://{address} answers"


@pytest.mark.parametrize("uri", ["http://", "http://[::1", "http://host:port"])
def test_malformed_address_is_refused(uri):
    """It is an error of the user, not of the server."""
    with pytest.raises(UserError, match="is not a valid address") as caught:
        check_store({"MLFLOW_TRACKING_URI": uri})
    assert caught.value.code == 2


@pytest.mark.parametrize("uri", ["./mlruns", "/data/mlruns", "file:///data/mlruns"])
def test_store_of_files_is_refused(uri):
    """MLflow raises an error for it, unless a variable allows it."""
    with pytest.raises(UserError, match="no longer tracks runs in a folder") as caught:
        check_store({"MLFLOW_TRACKING_URI": uri})
    assert "sqlite:///" in caught.value.fix and caught.value.code == 2
    assert check_store({"MLFLOW_TRACKING_URI": uri, "MLFLOW_ALLOW_FILE_STORE": "true"}) == uri


@pytest.mark.parametrize(
    "address", ["127.0.0.1:5000", "localhost:5000/path", "me:hunter2@mlflow.example:80", "[::1]:5000"]
)
def test_server_without_its_scheme_is_refused(address):
    """The fix has the scheme, and no password."""
    with pytest.raises(UserError, match="must start with http:// or https:// to name a server") as caught:
        check_store({"MLFLOW_TRACKING_URI": address})
    assert caught.value.fix == f"Write it as http://{address.rpartition('@')[2]}" and caught.value.code == 2
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "uri", ["databricks", "databricks-uc", "databricks://profile", "postgresql://me:pw@host/mlflow"]
)
def test_store_that_is_not_asked_is_described_so(uri):
    """A Databricks workspace needs no address."""
    assert check_store({"MLFLOW_TRACKING_URI": uri}) == f"{uri.replace('me:pw', '***')} is not checked"


def test_database_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    """Two slashes name no file, and MLflow would use a database in memory."""
    for uri, file in (("sqlite://x.db", "x.db"), ("sqlite://", "mlflow.db"), ("sqlite:///:memory:", "mlflow.db")):
        with pytest.raises(UserError, match="must name a file after sqlite:///") as caught:
            check_store({"MLFLOW_TRACKING_URI": uri})
        assert caught.value.fix.startswith(f"Write it as sqlite:///{file}, or ")
    with pytest.raises(UserError, match="folder of MLflow's database does not exist: /proc/nodir"):
        check_store({"MLFLOW_TRACKING_URI": "sqlite:////proc/nodir/x.db"})
    environment = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/x.db"}
    assert check_store(environment) == f"database {tmp_path}/x.db"
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(UserError, match=r"x\.db is not writable"):
        check_store(environment)


@pytest.mark.parametrize(
    ("cause", "reason"),
    [
        (
            "NewConnectionError('<urllib3.connection.HTTPConnection object at 0x7f>: Failed to establish a new "
            "connection: [Errno 111] Connection refused')",
            "Connection refused",
        ),
        (
            "ReadTimeoutError(\"HTTPConnectionPool(host='h', port=1): Read timed out. (read timeout=5)\")",
            "no answer in time",
        ),
    ],
)
def test_error_of_a_connection_is_shortened_to_its_cause(cause, reason):
    """MLflow gives all layers of it, and a message has no room for them."""
    text = (
        "API request to http://h:1/api failed with exception HTTPConnectionPool(host='h', port=1): Max retries "
        f"exceeded with url: /api/2.0/mlflow/experiments/get-by-name?experiment_name=vqvae2 (Caused by {cause})"
    )
    assert describe_error(ValueError(text)) == reason
    aborted = "('Connection aborted.', ConnectionResetError(104, 'Connection reset by peer'))"
    assert describe_error(ValueError(f"API request failed: {aborted}")) == "Connection reset by peer"


def write_experiment(path: Path, stage: str) -> None:
    """Write the part of MLflow's database that names an experiment."""
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("create table experiments (experiment_id integer, name text, lifecycle_stage text)")
        database.execute("insert into experiments values (7, 'vqvae2', ?)", (stage,))


@pytest.mark.parametrize("name", ["mlflow.db", "a%20b?#.db"])
def test_deleted_experiment_of_a_database_is_refused(tmp_path, name):
    """In the project's own database, or in one that MLFLOW_TRACKING_URI names."""
    environment = {} if name == "mlflow.db" else {"MLFLOW_TRACKING_URI": database_uri(tmp_path / name)}
    with chdir(tmp_path):
        check_store(environment)
        assert not (tmp_path / name).exists()  # a check creates nothing
        write_experiment(tmp_path / name, "deleted")
        with pytest.raises(UserError, match="experiment 'vqvae2' is deleted") as caught:
            check_store(environment)
        assert "--experiment-id 7" in caught.value.fix
        check_store({**environment, "MLFLOW_EXPERIMENT_NAME": "other"})


def test_damaged_database_is_refused(tmp_path):
    """A run would track nothing."""
    (tmp_path / "mlflow.db").write_text("not a database, and longer than the header of one: " + "x" * 200)
    with chdir(tmp_path), pytest.raises(UserError, match=r"mlflow\.db cannot be read: file is not a database"):
        check_store({})


def test_failed_upload_is_described_by_its_cause(monkeypatch):
    """A refusal and a server that is away have different fixes."""
    with server(401, "") as (address, _):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{address}")
        assert describe_failure(ValueError("x")).startswith(
            "The MLflow server rejects the user name, password or token."
        )
    assert describe_failure(ValueError("x")) == f"MLflow at http://{address} does not answer (x)."


def test_upload_after_a_run_reports_what_the_server_refuses(monkeypatch, tmp_path):
    """`vqvae2 sync-metrics` advises to start the server only if it does not answer."""
    with chdir(tmp_path):
        with server(403, "Invalid Host header") as (address, _):
            monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{address}")
            with pytest.raises(UserError, match="does not accept requests to this host name") as caught:
                sync_runs(tmp_path)
            assert "--allowed-hosts" in caught.value.fix
        with pytest.raises(UserError, match="MLflow does not answer") as caught:
            sync_runs(tmp_path)
        assert "Start the server" in caught.value.fix and "sync-metrics" in caught.value.fix
