"""Track runs: first in a journal beside the work, from there in MLflow. Training never waits for MLflow.

A thread sends what the journal holds every few seconds, with short timeouts. A server that is away costs a delay, told
once, and `sync` sends what never arrived.

    runs/pipeline/KEY/journal.jsonl                a run of the whole pipeline; one that did not end well goes on
    runs/pipeline/KEY/cached/STAGE/journal.jsonl   a stage that did not run in it, and a link to the run that made it
    WORK/tracked/KEY/journal.jsonl                 one execution of a stage; a resumed one goes on
"""

import hashlib
import os
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.errors import UserError
from stages.formats import artifact
from stages.runtime.context import Reporter
from stages.tracking.console import CompositeReporter, ConsoleReporter
from stages.tracking.journal import JOURNAL, Journal, ending, latest, locked, without_secrets
from stages.tracking.mlflow_sync import PIPELINE, UNOWNED, MlflowUploader, SystemMetrics, connect, prepare, store_uri

PARENT = "VQVAE2_PARENT_RUN"  # environment variable: the folder of the pipeline run that a stage belongs to
UPLOAD_INTERVAL_S = 3.0
PATIENCE_SECONDS = 30.0  # at a run's end, with a server that has answered so far
IMPATIENCE_SECONDS = 5.0  # with one that has not, or after a failure
REMEDY = "Send what is missing: vqvae2 sync-metrics"
SLOW = "it takes long"


@contextmanager
def open_run(
    stage: str,
    fingerprint: str,
    work: Path,
    *,
    params: Mapping[str, Any],
    inputs: Mapping[str, str],
    metrics: Path | None = None,
    outputs: Sequence[Path] = (),
    screen: Reporter | None = None,
) -> Iterator[Reporter]:
    """Track one execution of a stage; a resumed one continues its run.

    `inputs` are digests by name. When the block ends well, the numbers in the JSON file `metrics` become the run's
    final ones, and the files `outputs` its artifacts. Progress and messages go to `screen`, by default the terminal.
    """
    prepare()
    with ExitStack() as stack:
        screen = screen or stack.enter_context(ConsoleReporter(stage))
        folder = stack.enter_context(latest(work / "tracked", fingerprint))
        journal = Journal(folder)
        parent = os.environ.get(PARENT)
        journal.begin(
            folder.name,
            stage,
            fingerprint,
            params,
            {**_origin(), **_lock(), "dvc.stage": stage},
            inputs=inputs,
            parent=Path(parent).name if parent else UNOWNED + _digest(),
        )
        sender = UploadThread(journal, screen, Path(parent) if parent else None)
        sender.start()
        with _ending(journal, metrics, outputs, sender.finish):
            yield CompositeReporter([journal, screen])


@contextmanager
def parent_run(params: Mapping[str, Any], tags: Mapping[str, str], *, runs: Path = Path("runs")) -> Iterator[str]:
    """Track a run of the whole pipeline. Enter it only when something is to run.

    Yields what its stages are to find in the environment variable `PARENT`. The tag `mlflow.runName` names the run.
    """
    digest = _digest()
    with latest(runs / PIPELINE, digest) as folder:
        journal = Journal(folder)
        journal.begin(folder.name, PIPELINE, digest, params, {**_origin(), **tags}, inputs={}, parent="")

        def send(patience: float) -> None:
            journal.close()
            prepare()
            sent = SyncResult()
            folders = [path.parent for path in (folder / JOURNAL, *sorted(folder.glob(f"cached/*/{JOURNAL}")))]
            thread = threading.Thread(target=_send, args=(folders, sent), daemon=True)
            thread.start()
            thread.join(patience)
            if sent.trouble or thread.is_alive():
                with ConsoleReporter(PIPELINE) as screen:
                    screen.note(f"MLflow lacks a part of this run ({sent.trouble or SLOW}). {REMEDY}")

        with _ending(journal, None, (), send, tags=_lock):
            yield str(folder.resolve())


def link_cached(
    parent: str,
    stage: str,
    fingerprint: str,
    *,
    params: Mapping[str, Any],
    inputs: Mapping[str, str],
    metrics: Path | None = None,
    curves: Iterable[tuple[int, str, float]] = (),
) -> None:
    """Show a stage that did not run in the pipeline run `parent`: its numbers, and a link to the run that made it.

    `curves` are steps, names and values. Call it within `parent_run`.
    """
    folder = Path(parent) / "cached" / stage
    if (folder / JOURNAL).exists():
        return
    journal = Journal(folder)
    key = Path(parent).name
    tags = {**_origin(), **_lock(), "dvc.stage": stage}
    journal.begin(f"{key}/{stage}", stage, fingerprint, params, tags, inputs=inputs, parent=key, cached=True)
    for step, name, value in curves:
        journal.metrics({name: value}, step)
    journal.end("FINISHED", metrics=metrics)
    journal.close()


@dataclass
class SyncResult:
    """What `sync` did."""

    runs: int = 0  # are whole in MLflow now
    running: int = 0  # are under way, and send for themselves
    points: int = 0  # were sent just now
    missing: int = 0  # points that MLflow still lacks
    trouble: str = ""  # why something is missing


def sync(runs: Path = Path("runs")) -> SyncResult:
    """Send whatever MLflow lacks of all runs under `runs`. Doing it again changes nothing.

    A run whose process died is closed as KILLED. A run deleted in MLflow stays deleted.
    """
    prepare()
    try:
        connect()
    except Exception as error:
        raise UserError(
            f"MLflow does not answer: {_reason(error)}",
            where=without_secrets(store_uri()),
            fix="Start the server, or correct MLFLOW_TRACKING_URI; then run: vqvae2 sync-metrics",
            code=3,
        ) from error
    sent = SyncResult()
    for path in sorted(runs.rglob(JOURNAL)):
        with locked(path.parent) as ours:
            if not ours:
                sent.running += 1
                continue
            if not ending(path):
                journal = Journal(path.parent)
                journal.end("KILLED", error="The process ended without a word.")
                journal.close()
            _send([path.parent], sent, revive=False)
    return sent


class UploadThread(threading.Thread):
    """Send a journal while it grows, and note in it how busy the machine is."""

    def __init__(self, journal: Journal, screen: Reporter, parent: Path | None):
        super().__init__(name="tracking", daemon=True)
        self._journal, self._screen = journal, screen
        self._delivery = MlflowUploader(journal.folder)
        self._parent = MlflowUploader(parent) if parent else None  # whose own process sends only when all has ended
        self._machine = SystemMetrics(journal)
        self._last = threading.Event()
        self._trouble: Exception | None = None
        self._told = False

    def run(self) -> None:
        while not self._last.is_set():
            self._attempt()
            with suppress(Exception):  # how busy the machine is, is not worth the rest
                self._machine.look()
            self._last.wait(UPLOAD_INTERVAL_S)
        self._attempt()

    def finish(self, patience: float) -> None:
        """Send what is left, and say what stays behind. A server in trouble is not waited for long."""
        self._last.set()
        self.join(min(patience, IMPATIENCE_SECONDS) if self._trouble else patience)
        if not self.is_alive():
            self._journal.close()
        if self._trouble or self.is_alive():
            missing = self._delivery.missing()
            # A run that failed before it measured anything has its own message, which is what there is to read.
            if missing or self._trouble or patience > IMPATIENCE_SECONDS:
                lacking = f"{missing} points are" if missing else "The end of this run is"
                self._screen.note(
                    f"{lacking} not in MLflow yet ({_reason(self._trouble)}); kept in {self._journal.path}. {REMEDY}"
                )
        if self._journal.failure:
            self._screen.note(
                f"Some reports are lost, since {self._journal.path} took no more: {self._journal.failure}."
            )

    def _attempt(self) -> None:
        try:
            self._journal.sync()
            if self._parent:
                self._parent.flush()
            self._delivery.flush()
            self._trouble = None
        except Exception as error:  # whatever it is, the run goes on
            self._trouble = error
            if not self._told:
                self._told = True
                self._screen.note(
                    f"MLflow at {without_secrets(store_uri())} does not answer ({_reason(error)}). "
                    "The run goes on; what it reports is kept, and sent when MLflow answers."
                )


@contextmanager
def _ending(
    journal: Journal,
    metrics: Path | None,
    outputs: Sequence[Path],
    send: Callable[[float], None],
    *,
    tags: Callable[[], Mapping[str, str]] = dict,
) -> Iterator[None]:
    """Write into the journal how the block ended, and the tags that can be told only then."""
    try:
        yield
    except Exception as error:
        journal.end("FAILED", error=str(error), tags=tags())
        send(IMPATIENCE_SECONDS)
        raise
    except BaseException:
        journal.end("KILLED", tags=tags())
        send(IMPATIENCE_SECONDS)
        raise
    journal.end("FINISHED", metrics=metrics, outputs=outputs, tags=tags())
    send(PATIENCE_SECONDS)


def _send(folders: Sequence[Path], sent: SyncResult, *, revive: bool = True) -> None:
    for folder in folders:
        delivery = MlflowUploader(folder, revive=revive)
        try:
            delivery.flush()
            sent.runs += 1
        except Exception as error:
            sent.trouble = _reason(error)
        sent.points += delivery.delivered
        sent.missing += delivery.missing()


def _reason(error: Exception | None) -> str:
    """Say in a few words why something was not sent."""
    if error is None:
        return SLOW
    return (without_secrets(str(error)).strip() or type(error).__name__).partition("\n")[0][:160]


def _digest() -> str:
    """Name what a pipeline run computes: its settings and its code."""
    settings = Path("params.yaml")
    text = settings.read_bytes() if settings.is_file() else b""
    return hashlib.sha256(text + _git("rev-parse", "HEAD").encode()).hexdigest()[:16]


def _origin() -> dict[str, str]:
    """Tags that tell which code runs."""
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", "*.py", "dvc.yaml")
    tags = {"git.commit": commit, "mlflow.source.git.commit": commit, "git.dirty": "yes" if changed else "no"}
    return {name: value for name, value in tags.items() if value}


def _lock() -> dict[str, str]:
    """A tag that tells which results DVC knows: of a stage before it ran, of the pipeline after."""
    lock = Path("dvc.lock")
    return {"dvc.lock": artifact.sha256(lock)} if lock.is_file() else {}


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
