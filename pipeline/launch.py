"""From a stage's name to a call: paths from dvc.yaml, settings from params.yaml, both held against its signature."""

import dataclasses
import fcntl
import hashlib
import importlib
import inspect
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from pipeline import dag, origin, params, shared
from pipeline.environment import die_with_parent, heard, require_project
from stages.config import Params
from stages.errors import UserError, of_a_file
from stages.formats import artifact
from stages.runtime import tracking
from stages.runtime.journal import without_secrets
from stages.runtime.run import Reporter, Run

RUNS = Path("runs")
WAIT = "Wait for it or stop it, then run the same command again."
PATIENCE_SECONDS = 18.0  # for a stage to end that was asked to, before it is ended
FRESH = "VQVAE2_FRESH"  # set: forget what an earlier run of the same fingerprint has done
AFRESH = "afresh"  # a file in the work folder: what lies there was begun so, and is not to be forgotten once more


class Stopped(BaseException):
    """Somebody asked this process to end."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def run_stage(module: str, level: str = "") -> int:
    """Run one stage here on the inputs in place; return the exit status."""
    for number in (signal.SIGTERM, signal.SIGINT, *heard(signal.SIGHUP)):
        signal.signal(number, _stop)
    if "DVC_STAGE" in os.environ:  # by hand, the parent is a shell, which may leave it to itself
        die_with_parent(signal.SIGINT)  # which Ray answers in good order, and SIGTERM with a stack trace
    folder = RUNS / (f"{module}_{level}" if level else module)
    try:
        _run(module, level, folder)
        return 0
    except Stopped as asked:
        return shared.tell(stopped(asked.number))
    except SystemExit as ended:  # Ray's handlers in place of ours: SIGTERM ends with its number, SIGINT with 0
        return shared.tell(stopped(signal.SIGTERM if ended.code == signal.SIGTERM else signal.SIGINT))
    except BaseException as error:
        return shared.tell(report(error, folder))


def _run(module: str, level: str, folder: Path) -> None:
    require_project()
    data = params.read()
    settings = params.check(data)
    stage = dag.find(f"{module}_{level}" if level else module, dag.stages(data))
    inputs = digests(stage, settings)
    code = code_of(stage)
    fingerprint = fingerprint_of(stage, settings, inputs, code)
    function = importlib.import_module(f"stages.{stage.module}").run
    work = folder / fingerprint[:16]
    with owned(folder):
        for path in (work, *(Path(path).parent for path in (*stage.outs, *stage.metrics, *stage.plots))):
            path.mkdir(parents=True, exist_ok=True)
        if os.environ.get(FRESH):
            _forget(Run(stage.name, fingerprint, work, settings.cluster))
        os.environ.update(shared.cluster_environment())
        with tracking.open_run(
            stage.name,
            fingerprint,
            work,
            params=params.flat(sections_of(stage, settings)),
            inputs=inputs,
            metrics=Path(stage.metrics[0]) if stage.metrics else None,
            outputs=[Path(path) for path in (*stage.metrics, *stage.plots, f"{stage.outs[0]}/report.html")],
        ) as reporter:
            run = Run(stage.name, fingerprint, work.absolute(), settings.cluster, reporter)
            function(*positionals(function, stage, settings), **keywords(function, stage, settings), run=run)
            _refuse_edits(stage, data)
            _tell_edits(stage, code, reporter)


def _refuse_edits(stage: dag.Stage, began_with: Mapping[str, Any]) -> None:
    """Refuse to have finished under settings that params.yaml no longer holds.

    DVC looks there once a stage has ended: it would take the new values for those that the result was made with.
    """
    watched = tuple(f"{key}." for key in stage.params)
    then, now = (
        {key: value for key, value in params.flat(data).items() if f"{key}.".startswith(watched)}
        for data in (began_with, params.read())
    )
    edited = list(params.changes(then, now))
    if edited:
        raise UserError(
            f"Settings were edited while {stage.option} ran: {origin.few(edited)}.",
            where=params.FILE,
            fix="Run the same command again, for the new values; for the old ones, put them back before.",
            code=2,
        )


def _tell_edits(stage: dag.Stage, began_with: Mapping[str, str], reporter: Reporter) -> None:
    """Say which code is not the one that the stage began with: DVC notes down what it finds, as with settings.

    What days of training have made is not refused for a comment that was mended meanwhile.
    """
    now = code_of(stage)
    edited = sorted(path for path in began_with.keys() | now.keys() if began_with.get(path) != now.get(path))
    if edited:
        reporter.note(
            f"Edited while {stage.option} ran: {origin.few(edited)}. What it made is the earlier code's, and DVC "
            f"takes it for that of the code as it is now. If this matters: vqvae2 run --force --stage {stage.option}"
        )


def sections_of(stage: dag.Stage, settings: Params) -> dict[str, Any]:
    """Pick the settings that dvc.yaml lists for a stage, by their keys there."""
    return {
        key: settings.priors[stage.level] if key == f"priors.{stage.level}" else getattr(settings, key)
        for key in stage.params
    }


def positionals(function: Callable[..., None], stage: dag.Stage, settings: Params) -> list[Path | str]:
    """Fill a stage's positional parameters, by their names, with its level and the paths of dvc.yaml."""
    named: dict[str, Path | str] = {path.split("/")[1]: Path(path).absolute() for path in stage.artifacts}
    named |= {"level": stage.level, "source": Path(settings.dataset.source).absolute()}
    named |= {
        kind: Path(paths[0]).absolute()
        for kind, paths in (("out", stage.outs), ("metrics", stage.metrics), ("plots", stage.plots))
        if paths
    }
    return [named[name] for name, kind in _parameters(function) if kind != inspect.Parameter.KEYWORD_ONLY]


def keywords(function: Callable[..., None], stage: dag.Stage, settings: Params) -> dict[str, Any]:
    """Fill a stage's keyword parameters with the sections of params.yaml they name."""
    names = [name for name, kind in _parameters(function) if kind == inspect.Parameter.KEYWORD_ONLY and name != "run"]
    return {name: settings.priors[stage.level] if name == "prior" else getattr(settings, name) for name in names}


def _parameters(function: Callable[..., None]) -> list[tuple[str, Any]]:
    return [(name, parameter.kind) for name, parameter in inspect.signature(function).parameters.items()]


def digests(stage: dag.Stage, settings: Params) -> dict[str, str]:
    """Digest each input of a stage; refuse one that is missing or half written."""
    found = {}
    for path in stage.artifacts:
        folders = [Path(path)]
        if path == "artifacts/priors":
            folders = [Path(path, level) for level in settings.priors]
        for folder in folders:
            manifest = folder / artifact.MANIFEST
            if not manifest.is_file():
                made_by = f"prior_{folder.name}" if folder.parent.name == "priors" else _MADE_BY[folder.name]
                raise UserError(
                    f"{stage.option} reads {folder}, which {'is not whole' if folder.exists() else 'does not exist'}.",
                    where=folder.absolute(),
                    fix=f"Run: vqvae2 run --stage {made_by}",
                    code=4,
                )
            found[str(folder)] = artifact.sha256(manifest)
    if settings.dataset.source in stage.deps:
        found[settings.dataset.source] = _source_digest(Path(settings.dataset.source))
    return found


_MADE_BY = {"shards": "shard", "vqvae": "vqvae", "codes": "codes", "samples": "sample"}


def _source_digest(source: Path) -> str:
    if source.is_file():
        return artifact.sha256(source)
    # DVC has just hashed the contents; to know a folder again, names, lengths and times will do.
    digest = hashlib.sha256()
    for path in sorted(source.rglob("*")):
        if path.is_file():
            status = path.stat()
            digest.update(
                f"{path.relative_to(source)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="replace")
            )
    return digest.hexdigest()


def fingerprint_of(stage: dag.Stage, settings: Params, inputs: Mapping[str, str], code: Mapping[str, str]) -> str:
    """Name what a stage will make: a hash of its settings, its inputs and its code."""
    settled = [(key, _plain(section)) for key, section in sections_of(stage, settings).items()]
    whole = {"stage": stage.name, "settings": settled, "inputs": dict(inputs), "code": dict(code)}
    return hashlib.sha256(json.dumps(whole).encode()).hexdigest()


def code_of(stage: dag.Stage) -> dict[str, str]:
    """Digest the files that decide what a stage makes."""
    code: dict[str, str] = {}
    for entry in map(Path, stage.code):
        files = sorted(path for path in entry.rglob("*") if path.suffix == ".py") if entry.is_dir() else [entry]
        code |= {path.as_posix(): artifact.sha256(path) for path in files if path.is_file()}
    return code


def _plain(section: Any) -> Any:
    if dataclasses.is_dataclass(section) and not isinstance(section, type):
        return dataclasses.asdict(section)
    return section


def _forget(run: Run) -> None:
    """Forget what lies here, unless it was begun afresh itself, by a run that did not get to its end."""
    if (run.work / AFRESH).exists():
        print(f"note: what --force has begun goes on; to begin once more, delete {run.work}", file=sys.stderr)
        return
    if run.storage:
        run.storage.clear()
    for path in run.work.glob("*"):
        if path.name != "tracked":  # what MLflow may still have to receive
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (run.work / AFRESH).touch()


@contextmanager
def owned(folder: Path, doing: str = "Another process runs this stage") -> Iterator[None]:
    """Hold a folder for this process alone; refuse within a second while another holds it, for `doing`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+", encoding="utf-8") as file:
        try:
            _lock(file)  # the kernel lets go of it however the process ends
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{doing}: {file.read().strip() or 'it has just started'}.",
                where=folder / "lock",
                fix=WAIT,
                code=3,
            ) from None
        file.truncate(0)
        file.write(f"PID {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
        yield


def _lock(file: TextIO) -> None:
    for _ in range(5):  # who only asks for the owner holds it for an instant
        with suppress(BlockingIOError):
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(0.1)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def owner(folder: Path) -> str:
    """Name the process that holds a folder now; "" if none does."""
    try:
        with (folder / "lock").open(encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip() or "it has just started"
    except FileNotFoundError:
        pass
    return ""


def report(error: BaseException, folder: Path) -> int:
    """Print an error as its reader needs it; return the exit status."""
    mistake = _user_error(error) or of_a_file(error)
    if mistake is not None:
        print(f"error: {without_secrets(str(mistake))}", file=sys.stderr)
        return mistake.code
    log = folder / "error.log"
    trace = without_secrets("".join(traceback.format_exception(error))).encode(errors="backslashreplace")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log.write_bytes(trace)
    except OSError:  # what fails on a full or a read-only disk is told there too
        log = Path(tempfile.gettempdir()) / "vqvae2-error.log"
        log.write_bytes(trace)
    cause = getattr(error, "cause", None) or error  # what Ray has wrapped begins with lines of Ray's own
    first = (without_secrets(str(cause)).strip() or "no message").splitlines()[0]
    print(f"error: {type(cause).__name__}: {first}\n  traceback: {log}", file=sys.stderr)
    return 1


def _user_error(error: BaseException | None, depth: int = 0) -> UserError | None:
    """Find the user's mistake inside the errors that Ray wraps around what a worker raises."""
    if error is None or isinstance(error, UserError) or depth > 8:
        return error if isinstance(error, UserError) else None
    inside = [error.__cause__, getattr(error, "cause", None), *getattr(error, "worker_failures", {}).values()]
    for each in inside:
        if isinstance(each, BaseException) and (found := _user_error(each, depth + 1)):
            return found
    return None


def _stop(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_DFL)  # a second signal ends the process at once
    # An exception can get lost inside of a library. Workers have saved their state long before this.
    deadline = threading.Timer(PATIENCE_SECONDS, lambda: os._exit(shared.tell(stopped(number))))
    deadline.daemon = True
    deadline.start()
    raise Stopped(number)


def stopped(number: int) -> int:
    """Say which signal ended the work; return the exit status."""
    print(f"Stopped by {signal.Signals(number).name}. The same command resumes.", file=sys.stderr)
    return 128 + number
