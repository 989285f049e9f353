"""`vqvae2 run`: compose settings, check them, ask DVC what is out of date, and run that as one tracked run."""

import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

from pipeline import (
    dvc,
    dvc_yaml,
    finished_results,
    last_run,
    locks,
    params,
    preflight,
    presets,
    reconstruction_page,
    result_versions,
    run_state,
    shared_cluster,
    stage_runner,
)
from pipeline.checks.inputs import require_project_outside
from pipeline.commands import dry_run as dry_run_plan
from pipeline.compose import compose_settings, to_yaml
from pipeline.composed_from import describe_source
from pipeline.fingerprint import digest_inputs, identify, work_folder
from pipeline.params_drift import warn_drift, warn_reverted_overrides
from pipeline.process import STOP_SIGNALS, handle_signals, stopped
from pipeline.run_name import run_params, run_tags
from pipeline.text import first_few
from stages.config import Params
from stages.errors import UserError
from stages.tracking import tracker

REPORT = Path("artifacts/report/report.html")


def run(
    names: Sequence[str] = (),
    *,
    overrides: Sequence[str] = (),
    force: bool = False,
    only: bool = False,
    pull: bool = False,
    dry_run: bool = False,
) -> int:
    """Bring the named stages and their dependencies, or all stages, up to date; return the exit status.

    `force` also runs stages that are up to date, from their first step or from where an interrupted forced run stopped.
    `only` runs the named stages without their dependencies. Raises UserError if the run cannot succeed.
    """
    if only and not names:
        raise UserError(
            "--only requires a stage.", where="--only", fix="Add a stage, such as --stage evaluate.", code=2
        )
    lock: AbstractContextManager[None] = nullcontext()
    locks_project = bool(overrides) or not dry_run
    if locks_project:
        lock = locks.exclusive_project(stage_runner.RUNS, temporary=dry_run)
    with handle_signals(_stop), lock:
        if locks_project:
            run_state.clear(stage_runner.RUNS)
        with _apply_settings(overrides, keep=not dry_run) as settings:
            require_project_outside(Path(settings.dataset.source))  # else DVC fails with an error about .dvcignore
            stages = dvc_yaml.stages(params.read())
            targets = [dvc_yaml.find(name, stages).name for name in names]
            if not targets and settings.vqvae.quantizer.mode == "none":
                targets = ["vqvae"]
                print(reconstruction_page.NOTICE, file=sys.stderr)
            versions = result_versions.compute(params.read(), settings)
            reasons = dvc.out_of_date_reasons(stages, versions, targets, only=only)
            forced: set[str] = set()
            if force:
                forced = set(targets) if only else dvc.with_dependencies(stages, targets or list(stages))
                reasons |= {name: [*reasons.get(name, []), "forced"] for name in stages if name in forced}
            for name, texts in reasons.items():
                if not all(text.endswith(dvc.MISSING_STATES) for text in texts):  # DVC restores what is only missing
                    _require_not_pinned(stages[name], settings, dvc.with_dependencies(stages, [name]) & reasons.keys())
            if reasons and (description := last_run.describe(last_run.since_last_run(params.read()))):
                print(description)
            if not reasons:
                print("Everything is up to date.")
            elif dry_run:
                actions = dry_run_plan.predict(settings, stages, reasons, forced, pull=pull)
                print(dry_run_plan.format_plan(stages, reasons, actions))
            if only and not pull:
                _require_inputs([name for name in targets if name in reasons], stages, settings)
            if reasons:
                where = describe_source(overrides) if overrides else str(params.FILE)
                preflight.check(settings, reasons, where, pull=pull)
        if dry_run:
            return 0
        result_versions.write(versions)
        if not reasons:
            _report_reconstructions(settings, targets)
            return 0
        _remove_obsolete_priors(settings)
        last_run.record_run(params.read())
        return _run_dvc(settings, stages, targets, reasons, force=force, only=only, pull=pull)


def _require_not_pinned(stage: dvc_yaml.Stage, settings: Params, reruns: Collection[str]) -> None:
    """Raise UserError if a stage would compute although keep_results pins it.

    `reruns` names the stages among it and its dependencies that will run.
    """
    with suppress(UserError):  # a missing input
        work = work_folder(stage_runner.RUNS / stage.cli_name, stage, settings)
        if set(reruns) == {stage.name} and finished_results.exists(work):
            return  # the stage restores it: a release has added a setting or changed dvc.yaml
    result_versions.require_not_pinned(stage, settings)


def _require_inputs(targets: Sequence[str], stages: Mapping[str, dvc_yaml.Stage], settings: Params) -> None:
    """Raise UserError if an input of a stage is missing that no other target writes. --only runs no dependencies."""
    for name in targets:
        if dvc.with_dependencies(stages, [name]) & set(targets) == {name}:
            digest_inputs(stages[name], settings)


def _stop(number: int, frame: object) -> None:
    for stop_signal in STOP_SIGNALS:
        signal.signal(stop_signal, signal.SIG_IGN)  # a second signal must not interrupt the restoring of params.yaml
    raise SystemExit(stopped(number))


@contextmanager
def _apply_settings(overrides: Sequence[str], *, keep: bool) -> Iterator[Params]:
    """Write composed settings to params.yaml, where DVC reads them. Without overrides it is used as it is.

    The former params.yaml is restored unless `keep` is set and the block succeeds, or the user has edited the new one.
    """
    if not overrides:
        settings = params.load()
        warn_drift()
        yield settings
        return
    data, settings = compose_settings(overrides)
    warn_reverted_overrides(overrides, data)
    presets.warn_kept(data, settings)
    before = params.FILE.read_bytes() if params.FILE.is_file() else None
    time_ns = params.FILE.stat().st_mtime_ns if before is not None else 0
    composed = to_yaml(data).encode()
    succeeded = False
    try:
        params.write(composed)
        yield settings
        succeeded = True
    finally:
        if not (succeeded and keep) and params.FILE.is_file() and params.FILE.read_bytes() == composed:
            _restore_params(before, time_ns)


def _restore_params(contents: bytes | None, time_ns: int) -> None:
    if contents is None:
        params.FILE.unlink()
    else:
        params.write(contents)
        os.utime(params.FILE, ns=(time_ns, time_ns))  # `drift` compares it with the times of conf/


class ReproFailedError(Exception):
    """End of the tracked run as failed."""


class ReproStopped(BaseException):
    """End of the tracked run as stopped by a signal."""


def _run_dvc(
    settings: Params,
    stages: Mapping[str, dvc_yaml.Stage],
    targets: Sequence[str],
    reasons: Mapping[str, Sequence[str]],
    *,
    force: bool,
    only: bool,
    pull: bool,
) -> int:
    outcome = dvc.Outcome()
    with shared_cluster.SharedCluster() as cluster:
        try:
            with _tracked(settings) as parent:
                environment = {**os.environ, **parent, shared_cluster.FOLDER: str(cluster.folder)}
                if force:
                    environment[stage_runner.FORCE_RESTART] = "1"
                considered = targets if only else dvc.with_dependencies(stages, targets or list(stages))
                with run_state.record_run_state(stage_runner.RUNS, considered, reasons) as state:
                    outcome = dvc.run_repro(
                        targets,
                        reasons=reasons,
                        environment=environment,
                        on_change=lambda outcome: state.update(outcome.visited, outcome.current),
                        force=force,
                        only=only,
                        pull=pull,
                    )
                cluster.stop()  # it ends while the rest is recorded
                _track_cached_stages(outcome, settings, stages, parent[tracker.PARENT_RUN_VARIABLE])
                if not outcome.stop_signal:
                    require_cached(outcome)
                require_finished(outcome)
        except (ReproFailedError, ReproStopped):
            return failure_status(outcome, cluster.exit_status())
    clean_up(outcome, settings, stages)
    if REPORT.is_file() and (not targets or "evaluate" in targets):
        print(f"report        {REPORT}")
    _report_reconstructions(settings, targets)
    return 0


def _report_reconstructions(settings: Params, targets: Sequence[str]) -> None:
    """Write the report of a VQ-VAE that does not quantize, if the run was to bring it up to date."""
    if settings.vqvae.quantizer.mode == "none" and "vqvae" in targets:
        print(f"report        {reconstruction_page.write()}")


def require_finished(outcome: dvc.Outcome) -> None:
    """Raise ReproStopped if a signal ended `dvc repro`, and ReproFailedError if it failed."""
    if outcome.stop_signal:
        raise ReproStopped(outcome.stop_signal)
    if outcome.status:
        raise ReproFailedError(f"dvc repro ended with status {outcome.status}")


def failure_status(outcome: dvc.Outcome, stage_status: int) -> int:
    """Return the exit status of a failed or stopped run, and print what the failed stage has not printed itself.

    `stage_status` is the exit status that the failed stage recorded; 0 if none did. Raises UserError if a signal killed
    DVC.
    """
    if outcome.stop_signal:
        return stopped(outcome.stop_signal)
    if outcome.status < 0:
        raise UserError(
            f"DVC was killed by {signal.Signals(-outcome.status).name}.",
            where=Path.cwd(),
            fix="Run the same command again to resume.",
        )
    if stage_status:
        return stage_status
    print("DVC failed. Run the same command again to resume.", file=sys.stderr)
    return 1


def require_cached(
    outcome: dvc.Outcome, missing_from_cache: Callable[[Sequence[str]], list[str]] = dvc.missing_from_cache
) -> None:
    """Raise UserError if the result of a finished stage is not in DVC's cache, for example because its disk is full."""
    finished = outcome.ran[:-1] if outcome.status else outcome.ran  # the last one failed
    try:
        missing = missing_from_cache(finished)
    except UserError as error:  # another dvc process may be running: no reason to fail a finished run
        print(f"note: could not check that DVC's cache has all results. {error.what}", file=sys.stderr)
        return
    if missing:
        raise UserError(
            f"DVC's cache does not have the results of {first_few(missing)}; see DVC's message above. The only copy is "
            "in artifacts/.",
            where=f"{Path.cwd()}: dvc cache dir",
            fix="Free space there, but not in artifacts/ or runs/, then run: dvc commit -f " + " ".join(missing),
            code=3,
        )


@contextmanager
def _tracked(settings: Params) -> Iterator[dict[str, str]]:
    """Record this run as the parent of its stages' runs; yield the environment variables that name it."""
    command = shlex.join(["vqvae2", *sys.argv[1:]])
    with tracker.track_pipeline(run_params(settings), run_tags(params.read(), command)) as key:
        yield {tracker.PARENT_RUN_VARIABLE: key}


def _track_cached_stages(
    outcome: dvc.Outcome, settings: Params, stages: Mapping[str, dvc_yaml.Stage], parent: str
) -> None:
    """Add the stages that did not run to the tracked run."""
    for stage in (stages[name] for name in (*outcome.unchanged, *outcome.restored) if name in stages):
        with suppress(UserError):  # a missing input: the run that wrote the output is unknown
            stage_runner.track_cached(parent, stage, settings, *identify(stage, settings))


def clean_up(outcome: dvc.Outcome, settings: Params, stages: Mapping[str, dvc_yaml.Stage]) -> None:
    """Delete the parts of finished stages and their markers of a forced restart, after DVC has recorded the results.

    Stages that did not run now may have run before an interruption.
    """
    for stage in (stages[name] for name in outcome.visited if name in stages):
        with suppress(UserError):  # an input has been deleted meanwhile
            work = work_folder(stage_runner.RUNS / stage.cli_name, stage, settings)
            shutil.rmtree(work / "parts", ignore_errors=True)
            (work / stage_runner.RESTARTED_MARKER).unlink(missing_ok=True)


def _remove_obsolete_priors(settings: Params) -> None:
    """Delete priors of levels that the settings do not have: `sample` reads all priors in the folder."""
    for folder in Path("artifacts/priors").glob("*"):
        if folder.is_dir() and folder.name not in settings.priors:
            shutil.rmtree(folder)  # DVC restores it from its cache when the level is added again
