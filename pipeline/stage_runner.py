"""Runner of one stage: it calls the stage's function with the paths of dvc.yaml and the settings of params.yaml."""

import importlib
import inspect
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline import composed_from, dvc, dvc_yaml, finished_results, params, result_versions, shared_cluster
from pipeline.compute_facts import compute_facts, forward_flops
from pipeline.error_report import report
from pipeline.fingerprint import digest_inputs, fingerprint_of
from pipeline.locks import exclusive_lock
from pipeline.process import die_with_parent, not_ignored, require_project, stopped
from pipeline.run_name import EXPERIMENT_VARIABLE, run_params, run_tags
from pipeline.sections import sections_of
from pipeline.text import first_few
from stages import __name__ as STAGES
from stages.config import Params
from stages.errors import UserError
from stages.formats import curves
from stages.formats.flatten import flatten
from stages.runtime.context import StageContext, work_folder_name
from stages.runtime.control import start_in_thread
from stages.tracking import provenance, registry, tracker
from stages.tracking.mlflow_sync import SUMMARY_STAGE

RUNS = Path("runs")
SHUTDOWN_TIMEOUT_S = 18.0  # from a signal to the forced end of the process
RAISE_AGAIN_S = 0.01  # until a StageStopped that Python ignored is raised again
# Environment variable; if set, discard the state of an earlier run of the same fingerprint.
FORCE_RESTART = "VQVAE2_FRESH"
# File in the work folder: its state began under FORCE_RESTART and is not discarded again.
RESTARTED_MARKER = "restarted"
CRITIC = Path("artifacts/classifiers/shards")  # the classifier that was trained on the real images
# Mapping of params.yaml -> the parameter of a stage's function that gets one of its entries.
PARAMETERS = {"priors": "prior", "classifiers": "classifier", "rejections": "rejection"}
# Pictures that a run in MLflow shows: stage -> name -> file in the folder of its output. `evaluate` repeats those of
# the stages before it, which may not have run.
PICTURES = {
    "vqvae": {"reconstructions": "reconstructions.png"},
    "sample": {"samples": "grid.png"},
    "reject": {"accepted": "grid.png"},
    "evaluate": {"samples": "samples.png", "reconstructions": "reconstructions.png"},
}


class StageStopped(BaseException):
    """A signal asked this process to end."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def run_stage(module: str, level: str = "") -> int:
    """Run one stage in this process, on the inputs in place; return the exit status.

    The stage is a module and a level, or its name: `prior top`, `prior_top` or `prior@top`.
    """
    name = dvc_yaml.cli_name(f"{module}_{level}" if level else module)
    for number in (signal.SIGTERM, signal.SIGINT, *not_ignored(signal.SIGHUP)):
        signal.signal(number, _stop)
    if "DVC_STAGE" in os.environ:  # otherwise the parent is a shell, which may end before the stage
        die_with_parent(signal.SIGINT)  # Ray shuts down in order on SIGINT, and prints a stack trace on SIGTERM
    folder = RUNS / name
    try:
        _run(name, folder)
        return 0
    except StageStopped as stop:
        return shared_cluster.record_exit_status(stopped(stop.number))
    except SystemExit as error:
        # Ray's own signal handlers raise this: SIGTERM ends with its number, SIGINT with 0.
        number = signal.SIGTERM if error.code == signal.SIGTERM else signal.SIGINT
        return shared_cluster.record_exit_status(stopped(number))
    except BaseException as error:
        return shared_cluster.record_exit_status(report(error, folder))


def _run(name: str, folder: Path) -> None:
    require_project()
    data = params.read()
    settings = params.check(data)
    stage = dvc_yaml.find(name, dvc_yaml.stages(data))
    inputs, version = digest_inputs(stage, settings), result_versions.version_of(stage, settings)
    fingerprint = fingerprint_of(stage, settings, inputs, version)
    work = folder / work_folder_name(fingerprint)
    with exclusive_lock(folder):
        for path in (work, *(Path(path).parent for path in (*stage.outs, *stage.metrics, *stage.plots))):
            path.mkdir(parents=True, exist_ok=True)
        # A folder of images is identified by names, sizes and times: enough to resume, not to prove equal contents.
        is_restorable = not (settings.dataset.source in stage.deps and Path(settings.dataset.source).is_dir())
        if not os.environ.get(FORCE_RESTART) and is_restorable and _restore(stage, work):
            print(f"{stage.cli_name}: restored the finished result of version {version}", file=sys.stderr)
            _refuse_edited_settings(stage, data)
            if parent := os.environ.get(tracker.PARENT_RUN_VARIABLE):
                track_cached(parent, stage, settings, inputs, fingerprint)
        else:
            _require_not_pinned(stage, settings, folder)
            if os.environ.get(FORCE_RESTART):
                _clear(StageContext(stage.name, fingerprint, work, settings.cluster.for_stage(stage.cli_name)))
            _call(stage, fingerprint, work.absolute(), settings, inputs, data)
            _refuse_edited_source(stage, settings, version, work)
            finished_results.record(stage, work)
        # DVC records the version that the file has when the stage ends. Another command may have written that of a
        # later edit, so write the version of this run again.
        result_versions.write({**result_versions.compute(data, settings), stage.cli_name: version})


def _restore(stage: dvc_yaml.Stage, work: Path) -> bool:
    if not any(map(finished_results.exists, work.parent.glob("*"))):
        return False  # without asking DVC for its cache, which takes half a second
    cache = dvc.cache_folder()
    return cache is not None and finished_results.restore(stage, work, cache)


def _require_not_pinned(stage: dvc_yaml.Stage, settings: Params, folder: Path) -> None:
    """Raise UserError if keep_results forbids computing a stage; first restore its result, which DVC has deleted."""
    try:
        result_versions.require_not_pinned(stage, settings)
    except UserError:
        if (cache := dvc.cache_folder()) is not None:
            finished_results.restore_locked(stage, folder, cache)
        raise


def _call(
    stage: dvc_yaml.Stage,
    fingerprint: str,
    work: Path,
    settings: Params,
    inputs: Mapping[str, str],
    data: Mapping[str, Any],
) -> None:
    """Call the stage's function with paths and settings, and track it."""
    # A cluster takes seconds to start, and so do imports. Ray is imported later: it reads the environment.
    cluster_environment = start_in_thread(shared_cluster.cluster_environment, "cluster")
    function = importlib.import_module(f"{STAGES}.{stage.module}").run
    facts = compute_facts(stage, settings)
    os.environ.update(cluster_environment.result())
    parent = os.environ.get(tracker.PARENT_RUN_VARIABLE) or _pipeline_run(settings, data)
    start = time.monotonic()
    with tracker.track_stage(
        stage.cli_name,
        fingerprint,
        work,
        params=flatten(sections_of(stage, settings)),
        inputs=inputs,
        metrics=_metrics_file(stage),
        headline=_headline_files(stage, data),
        outputs=[*_outputs(stage), provenance.report_copy(work)],
        pictures=_pictures(stage),
        model=work / registry.SAVED_MODEL,
        parent=parent,
    ) as reporter:
        cluster = settings.cluster.for_stage(stage.cli_name)
        context = StageContext(stage.name, fingerprint, work, cluster, reporter, forward_flops(facts))
        function(*positionals(function, stage, settings), **keywords(function, stage, settings), context=context)
        _refuse_edited_settings(stage, data)
        if stage.module == SUMMARY_STAGE:
            from pipeline import logged_model  # imports torch, which the stage has imported by now

            logged_model.write(work, reporter, title=f"VQ-VAE-2 of {settings.dataset.name}")
        provenance.record_facts(
            stage.cli_name,
            Path(stage.outs[0]),
            work,
            time.monotonic() - start,
            inputs.values(),
            parent,
            _describe_choices(data),
            facts,
        )


def _describe_choices(data: Mapping[str, Any]) -> str:
    """Describe what params.yaml was composed from, such as "experiment=emoji32 seed=1"."""
    overrides = composed_from.overrides_of(data)
    preset = composed_from.choices_of(data).get("experiment")
    if preset and not any(composed_from.key_of(override) == "experiment" for override in overrides):
        overrides = [f"experiment={preset}", *overrides]
    return shlex.join(overrides) + (", edited" if overrides and composed_from.is_edited(data) else "")


def _metrics_file(stage: dvc_yaml.Stage) -> Path | None:
    """Return the file of all metrics of a stage; DVC shows only a few of those of `evaluate`."""
    if stage.module == "evaluate":
        return Path(stage.outs[0], "metrics.json")
    return Path(stage.metrics[0]) if stage.metrics else None


def _headline_files(stage: dvc_yaml.Stage, data: Mapping[str, Any]) -> list[Path]:
    """Return the metrics files of a stage and of the stages before it, which may not run."""
    stages = dvc_yaml.stages(data)
    names = dvc.with_dependencies(stages, [stage.name])
    return [Path(path) for name, other in stages.items() if name in names for path in other.metrics]


def _outputs(stage: dvc_yaml.Stage) -> list[Path]:
    """Return the files that a run in MLflow has as artifacts, without the report. Not all exist."""
    return [Path(path) for path in (*stage.metrics, *stage.plots)]


def _pictures(stage: dvc_yaml.Stage) -> dict[str, Path]:
    return {name: Path(stage.outs[0], file) for name, file in PICTURES.get(stage.module, {}).items()}


def _pipeline_run(settings: Params, data: Mapping[str, Any]) -> tracker.PipelineRun:
    """Describe the pipeline run of a stage that was started by DVC or by hand."""
    command = "dvc exp run" if EXPERIMENT_VARIABLE in os.environ else "dvc repro"
    if "DVC_STAGE" not in os.environ:
        command = shlex.join(["vqvae2", *sys.argv[1:]])
    return tracker.PipelineRun(run_params(settings), run_tags(data, command))


def track_cached(
    parent: str, stage: dvc_yaml.Stage, settings: Params, inputs: Mapping[str, str], fingerprint: str
) -> None:
    """Add a stage that did not compute its result to the tracked run `parent`, so that every run has all stages."""
    report = provenance.report_copy(RUNS / stage.cli_name / work_folder_name(fingerprint))
    tracker.record_cached_stage(
        parent,
        stage.cli_name,
        fingerprint,
        params=flatten(sections_of(stage, settings)),
        inputs=inputs,
        metrics=_metrics_file(stage),
        curves=curves.read(Path(stage.outs[0], curves.FILE)),
        headline=_headline_files(stage, params.read()),
        outputs=[*_outputs(stage), report if report.is_file() else Path(stage.outs[0], report.name)],
        pictures=_pictures(stage),
        model=report.parent / registry.SAVED_MODEL,
    )


def _refuse_edited_settings(stage: dvc_yaml.Stage, data: Mapping[str, Any]) -> None:
    """Raise UserError if params.yaml no longer holds the settings that the stage ran with.

    DVC reads params.yaml when a stage has ended, and would record the new values for the old result.
    """
    prefixes = tuple(f"{key}." for key in stage.params)
    before, now = (
        {key: value for key, value in flatten(values).items() if f"{key}.".startswith(prefixes)}
        for values in (data, params.read())
    )
    changes = list(params.changes(before, now))
    if changes:
        raise UserError(
            f"Settings were edited while {stage.cli_name} ran: {first_few(changes)}.",
            where=params.FILE,
            fix="To compute with the new values, run the same command again. To keep the result, first restore the old "
            "values.",
            code=2,
        )


def _refuse_edited_source(stage: dvc_yaml.Stage, settings: Params, version: str, work: Path) -> None:
    """Raise UserError if the source of a stage was edited while it ran: processes that started later imported the edit.

    Deletes the finished parts, because each may come from either source.
    """
    if result_versions.version_of(stage, settings) == version:
        return
    shutil.rmtree(work / "parts", ignore_errors=True)
    raise UserError(
        f"The source of {stage.cli_name} was edited while it ran, so its result may come from both versions.",
        where=Path.cwd(),
        fix="To compute with the edited source, run the same command again. To compute with the former one, restore it "
        f"and run: vqvae2 run --force --stage {stage.cli_name}",
        code=2,
    )


def positionals(function: Callable[..., None], stage: dvc_yaml.Stage, settings: Params) -> list[Path | str]:
    """Return the arguments for a stage's positional parameters: its level and the paths of dvc.yaml."""
    named: dict[str, Path | str] = {path.split("/")[1]: Path(path).absolute() for path in stage.artifacts}
    named |= {"level": stage.key, "source": Path(settings.dataset.source).absolute()}
    named |= {"images": Path("artifacts", stage.key).absolute(), "critic": CRITIC.absolute()}
    plots = [str(Path(path).parent) for path in stage.plots]  # all in one folder
    files = (("out", stage.outs), ("metrics", stage.metrics), ("plots", plots))
    named |= {kind: Path(paths[0]).absolute() for kind, paths in files if paths}
    return [named[name] for name, kind in _parameters(function) if kind != inspect.Parameter.KEYWORD_ONLY]


def keywords(function: Callable[..., None], stage: dvc_yaml.Stage, settings: Params) -> dict[str, Any]:
    """Return the arguments for a stage's keyword parameters: the sections of params.yaml that they name."""
    names = [
        name for name, kind in _parameters(function) if kind == inspect.Parameter.KEYWORD_ONLY and name != "context"
    ]
    sections = {
        PARAMETERS.get(name.partition(".")[0], name): section for name, section in sections_of(stage, settings).items()
    }
    return {name: sections[name] for name in names}


def _parameters(function: Callable[..., None]) -> list[tuple[str, Any]]:
    return [(name, parameter.kind) for name, parameter in inspect.signature(function).parameters.items()]


def _clear(context: StageContext) -> None:
    """Discard the state of an earlier run, unless an interrupted --force has started it."""
    if (context.work_dir / RESTARTED_MARKER).exists():
        text = f"note: resuming the interrupted --force; to restart once more, delete {context.work_dir}"
        print(text, file=sys.stderr)
        return
    if context.storage:
        context.storage.clear()
    for path in context.work_dir.glob("*"):
        if path.name != "tracked":  # MLflow may not have received all of it
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (context.work_dir / RESTARTED_MARKER).touch()


def _stop(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_DFL)  # a second signal ends the process at once
    # A library may swallow the exception below. Workers have saved their state long before this timeout.
    timer = threading.Timer(SHUTDOWN_TIMEOUT_S, lambda: os._exit(shared_cluster.record_exit_status(stopped(number))))
    timer.daemon = True
    timer.start()
    signal.signal(signal.SIGALRM, lambda *_: _raise_stopped(number))
    sys.unraisablehook = _repeat_ignored_stop
    _raise_stopped(number)


def _raise_stopped(number: int) -> None:
    raise StageStopped(number)


def _repeat_ignored_stop(ignored: "sys.UnraisableHookArgs") -> None:
    """Raise StageStopped again soon if Python ignored it, as it does inside of `__del__` and callbacks of weakref."""
    if isinstance(ignored.exc_value, StageStopped):
        signal.setitimer(signal.ITIMER_REAL, RAISE_AGAIN_S)
    else:
        sys.__unraisablehook__(ignored)
