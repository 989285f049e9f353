"""Threads that upload to MLflow during a run: their base class, and the thread of a stage."""

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from stages.runtime.context import Reporter
from stages.tracking.journal import Journal
from stages.tracking.mlflow_sync import MlflowUploader
from stages.tracking.sync_runs import SYNC_HINT, describe_error, describe_failure
from stages.tracking.system_metrics import SystemMetrics


@dataclass(frozen=True)
class UploadTiming:
    """Interval between two uploads, and the time a run waits at its end for the last one, in seconds."""

    interval_s: float = 3.0
    shutdown_timeout_s: float = 30.0
    # After a failure the user waits for the error message, and a server that does not answer is not worth waiting for.
    failed_shutdown_timeout_s: float = 5.0


DEFAULT_TIMING = UploadTiming()


class RetryingThread(threading.Thread):
    """Base class of threads that upload every few seconds until `finish`, and try again after a failure.

    If MLflow does not answer, the run continues. `show` prints a message.
    """

    def __init__(self, show: Callable[[str], None], timing: UploadTiming):
        super().__init__(name="tracking", daemon=True)
        self._show, self._timing = show, timing
        self._finishing = threading.Event()
        self._error: Exception | None = None  # of the last upload
        self._warned = False

    def _wait_for_rest(self, *, failed: bool) -> None:
        """Let the thread upload the rest, and wait for that until the timeout, which is shorter after a failure."""
        self._finishing.set()
        timeout_s = self._timing.shutdown_timeout_s
        if failed or self._error:
            timeout_s = min(timeout_s, self._timing.failed_shutdown_timeout_s)
        self.join(timeout_s)

    def _warn_once(self, error: Exception) -> None:
        """Show the first failure."""
        if not self._warned:
            self._warned = True
            self._show(
                f"{describe_failure(error)} The run continues; its metrics are saved and will be sent when MLflow "
                "accepts them."
            )


class UploadThread(RetryingThread):
    """Thread that uploads a journal and samples system metrics into it.

    Without an uploader, another process uploads the journal.
    """

    def __init__(
        self,
        journal: Journal,
        screen: Reporter,
        uploader: MlflowUploader | None,
        timing: UploadTiming = DEFAULT_TIMING,
    ):
        super().__init__(screen.message, timing)
        self._journal, self._uploader = journal, uploader
        self._system_metrics = SystemMetrics(journal)

    def run(self) -> None:
        while not self._finishing.is_set():
            self._upload()
            with suppress(Exception):  # a failing monitor must not stop the upload
                self._system_metrics.sample()
            self._finishing.wait(self._timing.interval_s)
        self._upload()

    def finish(self, *, failed: bool) -> None:
        """Upload the rest and close the journal; show on the screen what is not uploaded within the timeout.

        `failed` shortens the timeout: the user of a run that has failed or was killed waits for its error message. If
        only the end of such a run is not uploaded, nothing is shown.
        """
        self._wait_for_rest(failed=failed)
        if not self.is_alive():
            self._journal.close()
        if self._error or self.is_alive():
            missing = self._uploader.missing_points() if self._uploader else 0
            if missing or self._error or not failed:
                subject = f"{missing} points are" if missing else "The end of this run is"
                reason = describe_error(self._error)
                self._show(f"{subject} not in MLflow yet ({reason}), but saved in {self._journal.path}. {SYNC_HINT}")
        if self._journal.write_error:
            self._show(
                f"Some metrics, images or messages of this run are lost: writing {self._journal.path} failed "
                f"({self._journal.write_error})."
            )

    def _upload(self) -> None:
        if not self._uploader:
            with suppress(OSError):  # the journal reports it when it is closed
                self._journal.sync()
            return
        try:
            self._journal.sync()
            self._uploader.flush()
            self._error = None
        except Exception as error:  # no failure of MLflow may stop the run
            self._error = error
            self._warn_once(error)
