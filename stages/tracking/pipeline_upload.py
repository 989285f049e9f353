"""Thread that uploads the journals of a pipeline run and of its stages to MLflow, while the run goes on.

One process uploads for all stages, so no stage imports MLflow, waits for its requests, or waits for an upload at its
end. Stages are processes that DVC starts; each writes the path of its journal to the folder of the pipeline run:

    runs/pipeline/KEY/journal.jsonl                the pipeline run
    runs/pipeline/KEY/stages/STAGE-KEY             relative path to the folder of a stage's journal
    runs/pipeline/KEY/cached/STAGE/journal.jsonl   a stage that did not run in it
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from stages.formats.artifact import atomic_write
from stages.tracking.journal import CACHED, JOURNAL_FILE, STAGES
from stages.tracking.mlflow_store import configure_mlflow
from stages.tracking.mlflow_sync import MlflowUploader
from stages.tracking.sync_runs import SYNC_HINT, TIMED_OUT, UploaderFactory, describe_error
from stages.tracking.upload_thread import RetryingThread, UploadTiming


def register_stage(pipeline_run: Path, stage: str, folder: Path) -> None:
    """Register the journal in a stage's `folder` for upload by the process of the pipeline run."""
    path = pipeline_run / STAGES / f"{stage}-{folder.name}"
    path.parent.mkdir(exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(os.path.relpath(folder.resolve(), pipeline_run.resolve()), encoding="utf-8")


class PipelineUploadThread(RetryingThread):
    """Thread that uploads the journals of a pipeline run."""

    def __init__(self, folder: Path, uploader: UploaderFactory, timing: UploadTiming, show: Callable[[str], None]):
        super().__init__(show, timing)
        self._folder, self._create_uploader = folder, uploader
        self._uploaders: dict[Path, MlflowUploader] = {}

    def run(self) -> None:
        # The first upload waits as well: the process that starts DVC must not fork while a thread imports MLflow.
        while not self._finishing.wait(self._timing.interval_s):
            self._upload()
        self._upload(is_last=True)

    def finish(self, *, failed: bool) -> None:
        """Upload the rest; show what is not uploaded within the timeout.

        `failed` shortens the timeout: the user of a run that has failed or was killed waits for its error message.
        """
        self._wait_for_rest(failed=failed)
        if not self._error and not self.is_alive():
            return
        reason = TIMED_OUT if self._error is None else describe_error(self._error)
        missing = sum(uploader.missing_points() for uploader in list(self._uploaders.values()))
        if missing:
            self._show(f"{missing} points are not in MLflow yet ({reason}), but saved in runs/. {SYNC_HINT}")
        else:
            self._show(f"MLflow has not received all of this run ({reason}). {SYNC_HINT}")

    def _journals(self) -> Iterator[Path]:
        """Yield the folders of the journals. That of the pipeline run comes first, because it creates the run."""
        yield self._folder
        for path in sorted(self._folder.glob(f"{STAGES}/[!.]*-*")):  # not a file that is being written
            folder = self._folder / path.read_text(encoding="utf-8")
            if (folder / JOURNAL_FILE).is_file():  # not deleted since an earlier attempt of this run
                yield folder
        yield from sorted(path.parent for path in self._folder.glob(f"{CACHED}/*/{JOURNAL_FILE}"))

    def _upload(self, *, is_last: bool = False) -> None:
        """Upload the new records of every journal. A failure stops neither the other journals nor the run."""
        errors: list[Exception] = []
        try:
            configure_mlflow()
            for folder in self._journals():
                if self._finishing.is_set() and not is_last:
                    return
                try:
                    if folder not in self._uploaders:
                        self._uploaders[folder] = self._create_uploader(folder)
                    self._uploaders[folder].flush()
                except Exception as error:
                    errors.append(error)
        except Exception as error:
            errors.append(error)
        self._error = errors[0] if errors else None
        if self._error and not is_last:
            self._warn_once(self._error)
