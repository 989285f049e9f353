"""Tracking of runs: a run writes to a journal in its work folder, and a thread uploads the journal to MLflow.

Training never waits for MLflow. While a server does not answer, metrics stay in the journal; `sync_runs` uploads them
later. In `vqvae2 run`, its process uploads the journals of all stages (pipeline_upload.py); otherwise each stage
uploads its own.

    runs/pipeline/KEY/journal.jsonl                a run of the whole pipeline; resumed if it did not finish
    runs/pipeline/KEY/cached/STAGE/journal.jsonl   a stage that did not run in it, with a link to the run that did
    WORK/tracked/KEY/journal.jsonl                 one execution of a stage; resumed if it did not finish
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from stages.runtime.context import Reporter
from stages.tracking import tags as run_tags
from stages.tracking.console import CompositeReporter, ConsoleReporter
from stages.tracking.journal import CACHED, JOURNAL_FILE, Journal, end_status, resume_or_create_run
from stages.tracking.mlflow_store import configure_mlflow
from stages.tracking.mlflow_sync import PIPELINE_STAGE, REPRO_PREFIX, MlflowUploader
from stages.tracking.pipeline_upload import PipelineUploadThread, register_stage
from stages.tracking.progress_file import ProgressFile
from stages.tracking.sync_runs import UploaderFactory
from stages.tracking.upload_thread import DEFAULT_TIMING, UploadThread, UploadTiming

PARENT_RUN_VARIABLE = "VQVAE2_PARENT_RUN"  # environment variable: folder of the pipeline run that a stage belongs to


@dataclass(frozen=True)
class PipelineRun:
    """Pipeline run that DVC started itself, so that no process of ours tracks it; its stages describe it instead."""

    params: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)

    def key(self) -> str:
        """Return the key of this run: the same for all stages of one `dvc repro`."""
        experiment = self.tags.get(run_tags.DVC_EXPERIMENT, "")
        return REPRO_PREFIX + _pipeline_digest() + (f"-{experiment}" if experiment else "")


UNDESCRIBED_RUN = PipelineRun()


@contextmanager
def track_stage(
    stage: str,
    fingerprint: str,
    work_dir: Path,
    *,
    params: Mapping[str, Any],
    inputs: Mapping[str, str],
    metrics: Path | None = None,
    headline: Sequence[Path] = (),
    outputs: Sequence[Path] = (),
    pictures: Mapping[str, Path] | None = None,
    model: Path | None = None,
    parent: str | PipelineRun = UNDESCRIBED_RUN,
    screen: Reporter | None = None,
    uploader: UploaderFactory = MlflowUploader,
    timing: UploadTiming = DEFAULT_TIMING,
) -> Iterator[Reporter]:
    """Track one execution of a stage and yield its reporter; a resumed stage continues its run.

    `inputs` are digests by name, `parent` is the folder of the pipeline run, or describes one without a folder. If the
    block succeeds, the run gets the numbers in the JSON file `metrics` and the files `outputs`. The pipeline run gets
    the headline metrics in the JSON files `headline`, the pages among the outputs, `pictures`, PNG files by name, and
    the folder `model` if it exists.
    `screen` shows progress and messages, by default on the terminal.
    """
    parent_folder = Path(parent) if isinstance(parent, str) else None
    pipeline_run = UNDESCRIBED_RUN if isinstance(parent, str) else parent
    if not parent_folder:
        configure_mlflow()
    with ExitStack() as stack:
        screen = screen or stack.enter_context(ConsoleReporter(stage))
        folder = stack.enter_context(resume_or_create_run(work_dir / "tracked", fingerprint))
        journal = Journal(folder)
        journal.begin(
            folder.name,
            stage,
            fingerprint,
            params,
            run_tags.stage_tags(stage),
            inputs=inputs,
            parent=parent_folder.name if parent_folder else pipeline_run.key(),
            parent_params=pipeline_run.params,
            parent_tags=run_tags.code_tags() | dict(pipeline_run.tags),
        )
        if parent_folder:
            register_stage(parent_folder, stage, folder)
        thread = UploadThread(journal, screen, None if parent_folder else uploader(folder), timing)
        thread.start()
        with _record_end(
            journal,
            thread.finish,
            metrics=metrics,
            headline=headline,
            outputs=outputs,
            pictures=pictures,
            model=model,
        ):
            yield CompositeReporter([journal, screen, ProgressFile(work_dir)])


@contextmanager
def track_pipeline(
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    *,
    runs: Path = Path("runs"),
    uploader: UploaderFactory = MlflowUploader,
    timing: UploadTiming = DEFAULT_TIMING,
) -> Iterator[str]:
    """Track a run of the whole pipeline and yield its folder, which its stages need as PARENT_RUN_VARIABLE.

    Enter it only if at least one stage is to run. The tag `mlflow.runName` names the run.
    """
    digest = _pipeline_digest()
    with resume_or_create_run(runs / PIPELINE_STAGE, digest) as folder:
        journal = Journal(folder)
        journal.begin(
            folder.name, PIPELINE_STAGE, digest, params, {**run_tags.code_tags(), **tags}, inputs={}, parent=""
        )

        thread = PipelineUploadThread(folder, uploader, timing, _show)
        thread.start()

        def finish(*, failed: bool) -> None:
            journal.close()
            thread.finish(failed=failed)

        with _record_end(journal, finish, tags=run_tags.lock_tag):
            yield str(folder.resolve())


def _show(text: str) -> None:
    """Print a message about a pipeline run."""
    with ConsoleReporter(PIPELINE_STAGE) as screen:
        screen.message(text)


def record_cached_stage(
    parent: str,
    stage: str,
    fingerprint: str,
    *,
    params: Mapping[str, Any],
    inputs: Mapping[str, str],
    metrics: Path | None = None,
    curves: Iterable[tuple[int, str, float]] = (),
    headline: Sequence[Path] = (),
    outputs: Sequence[Path] = (),
    pictures: Mapping[str, Path] | None = None,
    model: Path | None = None,
) -> None:
    """Record a stage whose result was restored, with what it has written and a link to the run that computed it.

    `parent` is the folder of the pipeline run, `curves` are (step, name, value). Call it inside `track_pipeline`.
    """
    folder = Path(parent) / CACHED / stage
    if (folder / JOURNAL_FILE).exists() and end_status(folder / JOURNAL_FILE) == "FINISHED":
        return
    journal = Journal(folder)
    key = Path(parent).name
    tags = run_tags.stage_tags(stage)
    journal.begin(f"{key}/{stage}", stage, fingerprint, params, tags, inputs=inputs, parent=key, cached=True)
    last_step = 0
    for last_step, name, value in curves:
        journal.metrics({name: value}, last_step)
    for name, path in (pictures or {}).items():
        if path.is_file():
            journal.image(name, path.read_bytes(), last_step)
    journal.end("FINISHED", metrics=metrics, headline=headline, outputs=outputs, pictures=pictures, model=model)
    journal.close()


class _Finish(Protocol):
    def __call__(self, *, failed: bool) -> None: ...


@contextmanager
def _record_end(
    journal: Journal,
    finish: _Finish,
    *,
    tags: Callable[[], Mapping[str, str]] = dict,
    **results: Any,
) -> Iterator[None]:
    """Record how the block ended, with the tags that are known only then, and call `finish`.

    `results` are the files of a finished run, as in `Journal.end`.
    """
    try:
        yield
    except Exception as error:
        journal.end("FAILED", error=str(error), tags=tags())
        finish(failed=True)
        raise
    except BaseException:
        journal.end("KILLED", tags=tags())
        finish(failed=True)
        raise
    journal.end("FINISHED", tags=tags(), **results)
    finish(failed=False)


def _pipeline_digest() -> str:
    """Return a digest of what a pipeline run computes: params.yaml and the Git commit."""
    settings = Path("params.yaml")
    text = settings.read_bytes() if settings.is_file() else b""
    return hashlib.sha256(text + run_tags.git("rev-parse", "HEAD").encode()).hexdigest()[:16]
