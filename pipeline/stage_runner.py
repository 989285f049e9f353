"""From a stage's name to a call: paths from dvc.yaml, settings from params.yaml, both held against its signature."""

import importlib
import inspect
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline import dvc_yaml, params, params_header, shared_cluster
from pipeline.error_report import report
from pipeline.fingerprint import code_of, digests, fingerprint_of, sections_of
from pipeline.ownership import exclusive_lock
from pipeline.process import die_with_parent, not_ignored, require_project
from stages.config import Params
from stages.errors import UserError
from stages.runtime.context import Reporter, StageContext
from stages.tracking import tracker

RUNS = Path("runs")
PATIENCE_SECONDS = 18.0  # for a stage to end that was asked to, before it is ended
FORCE_RESTART = "VQVAE2_FRESH"  # set: forget what an earlier run of the same fingerprint has done
RESTARTED_MARKER = (
    "afresh"  # a file in the work folder: what lies there was begun so, and is not to be forgotten once more
)


class Stopped(BaseException):
    """Somebody asked this process to end."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def run_stage(module: str, level: str = "") -> int:
    """Run one stage here on the inputs in place; return the exit status."""
    for number in (signal.SIGTERM, signal.SIGINT, *not_ignored(signal.SIGHUP)):
        signal.signal(number, _stop)
    if "DVC_STAGE" in os.environ:  # by hand, the parent is a shell, which may leave it to itself
        die_with_parent(signal.SIGINT)  # which Ray answers in good order, and SIGTERM with a stack trace
    folder = RUNS / (f"{module}_{level}" if level else module)
    try:
        _run(module, level, folder)
        return 0
    except Stopped as asked:
        return shared_cluster.record_exit_status(stopped(asked.number))
    except SystemExit as ended:  # Ray's handlers in place of ours: SIGTERM ends with its number, SIGINT with 0
        return shared_cluster.record_exit_status(
            stopped(signal.SIGTERM if ended.code == signal.SIGTERM else signal.SIGINT)
        )
    except BaseException as error:
        return shared_cluster.record_exit_status(report(error, folder))


def _run(module: str, level: str, folder: Path) -> None:
    require_project()
    data = params.read()
    settings = params.check(data)
    stage = dvc_yaml.find(f"{module}_{level}" if level else module, dvc_yaml.stages(data))
    inputs = digests(stage, settings)
    code = code_of(stage)
    fingerprint = fingerprint_of(stage, settings, inputs, code)
    function = importlib.import_module(f"stages.{stage.module}").run
    work = folder / fingerprint[:16]
    with exclusive_lock(folder):
        for path in (work, *(Path(path).parent for path in (*stage.outs, *stage.metrics, *stage.plots))):
            path.mkdir(parents=True, exist_ok=True)
        if os.environ.get(FORCE_RESTART):
            _forget(StageContext(stage.name, fingerprint, work, settings.cluster))
        os.environ.update(shared_cluster.cluster_environment())
        with tracker.open_run(
            stage.name,
            fingerprint,
            work,
            params=params.flat(sections_of(stage, settings)),
            inputs=inputs,
            metrics=Path(stage.metrics[0]) if stage.metrics else None,
            outputs=[Path(path) for path in (*stage.metrics, *stage.plots, f"{stage.outs[0]}/report.html")],
        ) as reporter:
            run = StageContext(stage.name, fingerprint, work.absolute(), settings.cluster, reporter)
            function(*positionals(function, stage, settings), **keywords(function, stage, settings), run=run)
            _refuse_edits(stage, data)
            _tell_edits(stage, code, reporter)


def _refuse_edits(stage: dvc_yaml.Stage, began_with: Mapping[str, Any]) -> None:
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
            f"Settings were edited while {stage.cli_name} ran: {params_header.first_few(edited)}.",
            where=params.FILE,
            fix="Run the same command again, for the new values; for the old ones, put them back before.",
            code=2,
        )


def _tell_edits(stage: dvc_yaml.Stage, began_with: Mapping[str, str], reporter: Reporter) -> None:
    """Say which code is not the one that the stage began with: DVC notes down what it finds, as with settings.

    What days of training have made is not refused for a comment that was mended meanwhile.
    """
    now = code_of(stage)
    edited = sorted(path for path in began_with.keys() | now.keys() if began_with.get(path) != now.get(path))
    if edited:
        reporter.note(
            f"Edited while {stage.cli_name} ran: {params_header.first_few(edited)}. What it made is the earlier code's, and DVC "
            f"takes it for that of the code as it is now. If this matters: vqvae2 run --force --stage {stage.cli_name}"
        )


def positionals(function: Callable[..., None], stage: dvc_yaml.Stage, settings: Params) -> list[Path | str]:
    """Fill a stage's positional parameters, by their names, with its level and the paths of dvc.yaml."""
    named: dict[str, Path | str] = {path.split("/")[1]: Path(path).absolute() for path in stage.artifacts}
    named |= {"level": stage.level, "source": Path(settings.dataset.source).absolute()}
    named |= {
        kind: Path(paths[0]).absolute()
        for kind, paths in (("out", stage.outs), ("metrics", stage.metrics), ("plots", stage.plots))
        if paths
    }
    return [named[name] for name, kind in _parameters(function) if kind != inspect.Parameter.KEYWORD_ONLY]


def keywords(function: Callable[..., None], stage: dvc_yaml.Stage, settings: Params) -> dict[str, Any]:
    """Fill a stage's keyword parameters with the sections of params.yaml they name."""
    names = [name for name, kind in _parameters(function) if kind == inspect.Parameter.KEYWORD_ONLY and name != "run"]
    return {name: settings.priors[stage.level] if name == "prior" else getattr(settings, name) for name in names}


def _parameters(function: Callable[..., None]) -> list[tuple[str, Any]]:
    return [(name, parameter.kind) for name, parameter in inspect.signature(function).parameters.items()]


def _forget(run: StageContext) -> None:
    """Forget what lies here, unless it was begun afresh itself, by a run that did not get to its end."""
    if (run.work / RESTARTED_MARKER).exists():
        print(f"note: what --force has begun goes on; to begin once more, delete {run.work}", file=sys.stderr)
        return
    if run.storage:
        run.storage.clear()
    for path in run.work.glob("*"):
        if path.name != "tracked":  # what MLflow may still have to receive
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (run.work / RESTARTED_MARKER).touch()


def _stop(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_DFL)  # a second signal ends the process at once
    # An exception can get lost inside of a library. Workers have saved their state long before this.
    deadline = threading.Timer(PATIENCE_SECONDS, lambda: os._exit(shared_cluster.record_exit_status(stopped(number))))
    deadline.daemon = True
    deadline.start()
    raise Stopped(number)


def stopped(number: int) -> int:
    """Say which signal ended the work; return the exit status."""
    print(f"Stopped by {signal.Signals(number).name}. The same command resumes.", file=sys.stderr)
    return 128 + number
