"""Upload of the journals of runs that have ended, for `vqvae2 sync-metrics`."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stages.errors import UserError
from stages.tracking.journal import (
    CACHED,
    JOURNAL_FILE,
    STAGES,
    Journal,
    end_status,
    last_record,
    read_records,
    redact_secrets,
    try_lock,
)
from stages.tracking.mlflow_store import configure_mlflow, connect, store_uri
from stages.tracking.mlflow_sync import PIPELINE_STAGE, MlflowUploader
from stages.tracking.store_check import StoreUnavailableError, check_store, short_reason

UploaderFactory = Callable[..., MlflowUploader]

TIMED_OUT = "the upload takes too long"
SYNC_HINT = "To send the rest: vqvae2 sync-metrics"
START_SERVER = "Start the server or correct MLFLOW_TRACKING_URI, then run: vqvae2 sync-metrics"
MAX_ERROR_LENGTH = 160  # characters of an error of MLflow that fit into a message


@dataclass
class SyncResult:
    """Counts of an upload, and the last error."""

    completed_runs: int = 0  # are complete in MLflow
    active_runs: int = 0  # are still running, or are stages of a run that is: those upload their journals
    sent_points: int = 0
    missing_points: int = 0  # are still not in MLflow
    error: str = ""


def sync_runs(runs: Path = Path("runs"), *, uploader: UploaderFactory = MlflowUploader) -> SyncResult:
    """Upload what MLflow does not have of all runs in the folder `runs`. Repeating it changes nothing.

    A run whose process died gets the status KILLED. A run that was deleted in MLflow stays deleted. Raises UserError if
    MLflow does not answer, or refuses access.
    """
    configure_mlflow()
    try:
        check_store()
        connect()
    except StoreUnavailableError as error:
        error.fix = START_SERVER
        raise
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"MLflow cannot be used: {describe_error(error).rstrip('.')}.",
            where=redact_secrets(store_uri()),
            fix=START_SERVER,
            code=3,
        ) from error
    result = SyncResult()
    for path in sorted(runs.rglob(JOURNAL_FILE)):
        with try_lock(path.parent) as acquired:
            if not acquired or _is_uploaded_by_its_run(path, runs):
                result.active_runs += 1
                continue
            if not end_status(path):
                _record_killed(path.parent)
            _upload_journal(path.parent, result, uploader)
    return result


def _record_killed(folder: Path) -> None:
    """Record that the process of a run died, at the time of its last record: that may be hours ago.

    The records of a pipeline run are in its stages' journals too.
    """
    stages = [folder / link.read_text(encoding="utf-8") for link in folder.glob(f"{STAGES}/*")]
    paths = [journal / JOURNAL_FILE for journal in (folder, *stages, *folder.glob(f"{CACHED}/*"))]
    times = [last_record(path).get("time", 0.0) for path in paths if path.is_file()]
    journal = Journal(folder, clock=lambda: max(times) or time.time())
    journal.end("KILLED", error="The process ended unexpectedly.")
    journal.close()


def _is_uploaded_by_its_run(journal: Path, runs: Path) -> bool:
    """Return whether a journal is that of a stage of a pipeline run that goes on."""
    begin, _ = next(read_records(journal), ({}, 0))
    pipeline_run = runs / PIPELINE_STAGE / (begin.get("parent") or "none")
    if not pipeline_run.is_dir():
        return False
    with try_lock(pipeline_run) as acquired:
        return not acquired


def _upload_journal(folder: Path, result: SyncResult, uploader: UploaderFactory) -> None:
    """Upload a journal and update `result`. A failure is the last error of the result."""
    upload = uploader(folder, recreate_deleted=False)
    try:
        upload.flush()
        result.completed_runs += 1
    except Exception as error:
        result.error = describe_error(error)
    result.sent_points += upload.sent_points
    result.missing_points += upload.missing_points()


def describe_failure(error: Exception) -> str:
    """Describe in a sentence why MLflow has not accepted an upload: what it refuses, or that it does not answer."""
    problem = "refuses the upload"
    try:
        check_store()
    except StoreUnavailableError:
        problem = "does not answer"
    except UserError as refusal:
        return f"{refusal.what} {refusal.fix}"
    return f"MLflow at {redact_secrets(store_uri())} {problem} ({describe_error(error)})."


def describe_error(error: Exception | None) -> str:
    """Return the cause of a failed upload in a line, without credentials; None is a timeout."""
    if error is None:
        return TIMED_OUT
    line = (redact_secrets(str(error)).strip() or type(error).__name__).partition("\n")[0]
    return short_reason(line)[:MAX_ERROR_LENGTH]
