"""Connection to the MLflow store: MLFLOW_TRACKING_URI, or by default a database in the project's folder."""

import fcntl
import getpass
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from stages.tracking.tags import KEY, PARENT_RUN

if TYPE_CHECKING:
    from mlflow import MlflowClient

DATABASE = "mlflow.db"
ID_DIGITS = 32  # hexadecimal digits of a run's id
MIN_PREFIX = 6  # digits of a run's id that are enough to name it


def project_folder(working_dir: Path | None = None) -> Path:
    """Return the project's folder: the working folder, or the project that it is DVC's temporary copy of."""
    working_dir = (working_dir or Path.cwd()).resolve()
    for folder in working_dir.parents:
        if folder.parts[-3:] == (".dvc", "tmp", "exps"):  # DVC deletes the copy when a queued experiment has ended
            return folder.parents[2]
    return working_dir


def store_uri() -> str:
    """Return the URI of the store: MLFLOW_TRACKING_URI, or the database in the project's folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or database_uri(project_folder() / DATABASE)


def database_uri(path: Path) -> str:
    """Return the URI of an SQLite database, quoted: a path may hold %, ? and #, which have a meaning in a URI."""
    from sqlalchemy import URL

    # With the driver in the scheme: for sqlite:// MLflow also creates the folder that the quoted path names.
    return URL.create("sqlite+pysqlite", database=str(path)).render_as_string()


def experiment_name(environment: Mapping[str, str] = os.environ) -> str:
    """Return the name of the experiment in MLflow."""
    return environment.get("MLFLOW_EXPERIMENT_NAME") or "vqvae2"


def configure_mlflow() -> None:
    """Import MLflow without telemetry and console output, and with short timeouts.

    Call it before threads start: threads that import the same libraries at the same time can deadlock.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # two lines for each run that ends
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")  # seconds
    import mlflow  # noqa: F401

    for name in ("mlflow", "alembic", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)


def connect() -> tuple["MlflowClient", str]:
    """Return a client of the store and the id of the experiment; create both on first use.

    Raises any exception of MLflow if the store does not answer.
    """
    from mlflow import MlflowClient

    name = experiment_name()
    is_local = not os.environ.get("MLFLOW_TRACKING_URI")
    with store_lock():
        if is_local:
            create_database(project_folder() / DATABASE)
        client = MlflowClient(store_uri())
        if experiment := client.get_experiment_by_name(name):
            return client, experiment.experiment_id
        return client, client.create_experiment(name, (project_folder() / "mlruns").as_uri() if is_local else None)


def find_run_key(run_id: str) -> str:
    """Return our key of the pipeline run that a run of MLflow is, or is a part of; "" if there is none.

    `run_id` is the id of the run or its first digits, which must be of one run only. The store is not created, and
    not asked about a text that cannot be an id. Raises any exception of MLflow if the store does not answer.
    """
    is_missing = not os.environ.get("MLFLOW_TRACKING_URI") and not (project_folder() / DATABASE).is_file()
    if is_missing or not re.fullmatch(rf"[0-9a-f]{{{MIN_PREFIX},{ID_DIGITS}}}", run_id):
        return ""
    configure_mlflow()
    from mlflow import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

    try:
        client, experiment = connect()
        if len(run_id) < ID_DIGITS:
            ids = [run.info.run_id for run in client.search_runs([experiment]) if run.info.run_id.startswith(run_id)]
            if len(ids) != 1:
                return ""
            run_id = ids[0]
        tags = client.get_run(run_id).data.tags
        if parent := tags.get(PARENT_RUN):
            tags = client.get_run(parent).data.tags
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            raise
        return ""
    return str(tags.get(KEY, ""))


def _create_tables(path: Path) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    # With the quoted location of artifacts: MLflow writes it into the text of an SQL statement, and by default it is a
    # path, whose quotes and colons would end the statement.
    SqlAlchemyStore(database_uri(path), (path.parent / "mlruns").as_uri())


def create_database(path: Path, create_tables: Callable[[Path], None] = _create_tables) -> None:
    """Create MLflow's database atomically: a process killed on the way would leave one that no other can use."""
    if path.exists():
        return
    for leftover in path.parent.glob(f"{path.name}.new-*"):
        leftover.unlink()
    # The name is unique because MLflow creates tables only once per process and name.
    temporary = path.with_name(f"{path.name}.new-{time.time_ns()}")
    create_tables(temporary)
    temporary.rename(path)


@contextmanager
def store_lock() -> Iterator[None]:
    """Exclude other processes of this project: two at once would damage a new database or create a run twice."""
    with (project_folder() / f"{DATABASE}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def user_name(lookup: Callable[[], str] = getpass.getuser) -> str:
    """Return the name of the current user, or the user id where it has no name, as in a container."""
    try:
        return lookup()
    except (KeyError, OSError):
        return str(os.getuid())
