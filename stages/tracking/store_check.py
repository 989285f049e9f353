"""Check of the MLflow store: its address, the answer of its server, and the experiment. Does not import MLflow."""

import json
import os
import re
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from urllib.parse import quote, urlsplit

from stages.errors import UserError
from stages.tracking.journal import redact_secrets
from stages.tracking.mlflow_store import DATABASE, experiment_name, project_folder

# Schemes of the store URIs that MLflow supports.
SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "file", "databricks", "databricks-uc")
WITHOUT_ADDRESS = ("databricks", "databricks-uc")  # store URIs that are complete without ://
TIMEOUT_S = 3.0
# Variables that choose an authentication which only MLflow itself implements.
OTHER_AUTHENTICATION = ("MLFLOW_TRACKING_AUTH", "MLFLOW_TRACKING_AWS_SIGV4")
TRACK_LOCALLY = f"unset MLFLOW_TRACKING_URI to track runs in {DATABASE} in this folder"
SYNC_LATER = "Runs continue without it. Upload their metrics later: vqvae2 sync-metrics"


class StoreUnavailableError(UserError):
    """Server that does not answer now. A run continues without it."""


def check_store(environment: Mapping[str, str] = os.environ, *, timeout_s: float = TIMEOUT_S) -> str:
    """Check that MLflow can store runs; return a description of the store.

    Raises StoreUnavailableError if the server does not answer, and UserError if it refuses access, is not MLflow, or if
    the experiment is deleted.
    """
    uri, name = environment.get("MLFLOW_TRACKING_URI", ""), experiment_name(environment)
    check_scheme(uri)
    scheme = uri.partition("://")[0]
    if scheme in ("http", "https"):
        _check_server(uri.rstrip("/"), name, environment, timeout_s)
        return f"{redact_secrets(uri)} answers"
    if not uri:
        _check_database(project_folder() / DATABASE, name)
        return f"{DATABASE} in this folder"
    if scheme.partition("+")[0] == "sqlite":
        path = _database_file(uri)
        _check_database(path, name)
        return f"database {path}"
    if scheme == "file" or ("://" not in uri and uri not in WITHOUT_ADDRESS):
        _refuse_folder(uri, environment)
        return uri
    return f"{redact_secrets(uri)} is not checked"


def _database_file(uri: str) -> Path:
    """Return the file of an SQLite database. Raises UserError if MLflow cannot write it."""
    from sqlalchemy import make_url

    url = make_url(uri)
    if url.database in (None, "", ":memory:"):
        raise UserError(
            f"MLFLOW_TRACKING_URI must name a file after sqlite:///, got {uri}.",
            where="MLFLOW_TRACKING_URI",
            fix=f"Write it as sqlite:///{url.host or DATABASE}, or {TRACK_LOCALLY}.",
            code=2,
        )
    path = Path(url.database)
    if not path.parent.is_dir():
        raise UserError(
            f"The folder of MLflow's database does not exist: {path.parent}.",
            where=f"MLFLOW_TRACKING_URI={uri}",
            fix=f"Create it, correct MLFLOW_TRACKING_URI, or {TRACK_LOCALLY}.",
            code=2,
        )
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(
            f"MLflow's database {path} is not writable.",
            where=f"MLFLOW_TRACKING_URI={uri}",
            fix=f"Correct the permissions of the file and its folder, or {TRACK_LOCALLY}.",
            code=3,
        )
    return path


def _refuse_folder(uri: str, environment: Mapping[str, str]) -> None:
    """Raise UserError for a store of files, which MLflow opens only on demand."""
    if environment.get("MLFLOW_ALLOW_FILE_STORE", "").lower() not in ("true", "1"):
        raise UserError(
            "MLflow no longer tracks runs in a folder.",
            where=f"MLFLOW_TRACKING_URI={uri}",
            fix=f"Use a database, such as sqlite:///{DATABASE}, or {TRACK_LOCALLY}. To keep the folder: "
            "MLFLOW_ALLOW_FILE_STORE=true",
            code=2,
        )


def check_scheme(uri: str) -> None:
    """Raise UserError if MLflow does not support a store URI."""
    address = uri.rpartition("@")[2]
    if "://" not in uri and re.fullmatch(r"([\w.-]+|\[[\da-fA-F:]+\]):\d+(/.*)?", address):
        raise UserError(
            f"MLFLOW_TRACKING_URI must start with http:// or https:// to name a server, got {address}.",
            where="MLFLOW_TRACKING_URI",
            fix=f"Write it as http://{address}",
            code=2,
        )
    scheme = uri.partition("://")[0].partition("+")[0] if "://" in uri else "file"  # mysql+pymysql
    if scheme not in SCHEMES:
        raise UserError(
            f"MLFLOW_TRACKING_URI must start with one of {', '.join(SCHEMES)}, got {scheme}://.",
            where=uri.rpartition("@")[2],
            fix=f"Correct it, or unset it to track runs in {DATABASE} in this folder.",
            code=2,
        )


def _check_server(uri: str, name: str, environment: Mapping[str, str], timeout_s: float) -> None:
    """Ask a server for the experiment, as MLflow does before it creates a run."""
    import requests

    where = redact_secrets(uri)
    user, token = environment.get("MLFLOW_TRACKING_USERNAME"), environment.get("MLFLOW_TRACKING_TOKEN")
    password = environment.get("MLFLOW_TRACKING_PASSWORD", "")
    insecure = environment.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() == "true"
    try:
        response = requests.get(
            f"{uri}/api/2.0/mlflow/experiments/get-by-name",
            params={"experiment_name": name},
            auth=(user, password) if user else None,
            headers={"Authorization": f"Bearer {token}"} if token and not user else {},
            verify=False if insecure else environment.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or True,
            timeout=timeout_s,
        )
    except (requests.RequestException, ValueError, OSError) as error:
        reason = redact_secrets(str(error)).partition("\n")[0]
        if isinstance(error, requests.ConnectTimeout | requests.ReadTimeout):
            reason = f"no answer within {timeout_s:g} s"
        elif isinstance(error, requests.exceptions.SSLError):
            raise UserError(
                f"The certificate of the MLflow server is not accepted: {short_reason(reason)}.",
                where=where,
                fix=f"Set MLFLOW_TRACKING_SERVER_CERT_PATH to the certificate of its authority, or {TRACK_LOCALLY}.",
                code=3,
            ) from None
        elif isinstance(error, requests.ConnectionError):
            reason = short_reason(reason)
        else:
            raise UserError(
                f"MLFLOW_TRACKING_URI is not a valid address: {reason}.",
                where=where,
                fix=f"Write it as http://HOST:PORT, or {TRACK_LOCALLY}.",
                code=2,
            ) from None
        raise _unavailable(where, reason) from None
    if not any(environment.get(variable) for variable in OTHER_AUTHENTICATION):
        judge_response(response.status_code, response.text, name, where)


def judge_response(status: int, text: str, name: str, where: str) -> None:
    """Raise UserError unless a server's answer to the request for an experiment is that of MLflow."""
    if status == 401:
        raise UserError(
            "The MLflow server rejects the user name, password or token.",
            where=where,
            fix="Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN; or "
            f"{TRACK_LOCALLY}.",
            code=3,
        )
    if status == 403:
        is_unknown_host = "Invalid Host header" in text
        host = urlsplit(where).netloc.rpartition("@")[2]
        raise UserError(
            "The MLflow server does not accept requests to this host name."
            if is_unknown_host
            else f"The MLflow server refuses access to the experiment {name!r}.",
            where=where,
            fix=f"Start it with: mlflow server --allowed-hosts {host}"
            if is_unknown_host
            else f"Ask its administrator for permission, name another experiment in MLFLOW_EXPERIMENT_NAME, or "
            f"{TRACK_LOCALLY}.",
            code=3,
        )
    if status >= 500 or status == 429:
        raise _unavailable(where, f"it answers with HTTP status {status}")
    try:
        answer = json.loads(text)
    except ValueError:  # a web page
        answer = None
    answer = answer if isinstance(answer, dict) else {}
    experiment = answer.get("experiment")
    if isinstance(experiment, dict) and status == 200:
        require_active(experiment.get("lifecycle_stage"), name, experiment.get("experiment_id"), where)
    elif str(answer.get("error_code")).lower() != "resource_does_not_exist":  # a run creates the experiment then
        raise UserError(
            f"The program at this address is not an MLflow server: it answers with HTTP status {status}.",
            where=where,
            fix=f"Correct MLFLOW_TRACKING_URI, or {TRACK_LOCALLY}.",
            code=2,
        )


def require_active(lifecycle_stage: object, name: str, experiment_id: object, where: object) -> None:
    """Raise UserError if an experiment is deleted: MLflow keeps its name and accepts no runs."""
    if lifecycle_stage == "deleted":
        raise UserError(
            f"The MLflow experiment {name!r} is deleted.",
            where=where,
            fix=f"Restore it: mlflow experiments restore --experiment-id {experiment_id}. Or name another one in "
            "MLFLOW_EXPERIMENT_NAME.",
            code=3,
        )


def _check_database(path: Path, name: str) -> None:
    """Check the experiment in a database file; nothing if MLflow has not created it yet."""
    if not path.is_file():
        return
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path.absolute()))}?mode=ro", uri=True)) as database:
            query = "select lifecycle_stage, experiment_id from experiments where name = ?"
            row = database.execute(query, (name,)).fetchone()
    except sqlite3.OperationalError:  # locked by another process, or no table yet
        return
    except sqlite3.DatabaseError as error:
        raise UserError(
            f"{path.name} cannot be read: {error}.",
            where=path,
            fix="Restore it, or move it away: the next run creates another one.",
            code=4,
        ) from None
    if row:
        require_active(row[0], name, row[1], path)


def _unavailable(where: str, reason: str) -> StoreUnavailableError:
    return StoreUnavailableError(f"MLflow does not answer: {reason}.", where=where, fix=SYNC_LATER, code=3)


def short_reason(text: str) -> str:
    """Extract the cause from the nested text of an error of urllib3; return other texts as they are."""
    if "Connection aborted." in text:
        return re.findall(r"'([^']+)'", text)[-1]
    if "HTTPConnectionPool(" not in text and "HTTPSConnectionPool(" not in text:
        return text
    if "timed out" in text.lower():
        return "no answer in time"
    return text.rpartition("] ")[2].rpartition("Caused by ")[2].strip("()'\". ") or text
