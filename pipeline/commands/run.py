"""`vqvae2 run`: compose, check, ask DVC what is out of date, and bring it up to date as one tracked run."""

import os
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from pipeline import dvc, dvc_yaml, ownership, params, params_header, preflight, shared_cluster, stage_runner
from pipeline.fingerprint import code_of, digests, fingerprint_of, sections_of
from pipeline.process import ENDING, handle_signals
from stages.config import Params
from stages.errors import UserError
from stages.formats import curves


def run(
    wanted: Sequence[str] = (),
    *,
    overrides: Sequence[str] = (),
    force: bool = False,
    only: bool = False,
    pull: bool = False,
    dry_run: bool = False,
) -> int:
    """Bring the wanted stages and what they need, or all stages, up to date; return the exit status.

    `force` runs stages that are up to date too, from their first step, or from where such a run was interrupted;
    `only` leaves alone what the stage needs.
    """
    if only and not wanted:
        raise UserError("--only needs a stage.", where="--only", fix="Add one, such as --stage evaluate.", code=2)
    with handle_signals(_stop), _alone() if overrides or not dry_run else nullcontext():
        with _settings(overrides, keep=not dry_run) as settings:
            stages = dvc_yaml.stages(params.read())
            targets = [dvc_yaml.find(name, stages).name for name in wanted]
            why = dvc.reasons(stages, targets, only=only)
            if force:
                forced = targets if only else dvc.needed(stages, targets or list(stages))
                why |= {name: [*why.get(name, []), "forced"] for name in stages if name in forced}
            if dry_run or not why:
                _print_plan(why, stages)
            if why:
                where = params_header.describe_source(overrides) if overrides else str(params.FILE)
                preflight.check(settings, why, where, pull=pull)
        if dry_run or not why:
            return 0
        _remove_leftovers(settings)
        return _reproduce(settings, stages, targets, why, force=force, only=only, pull=pull)


def _stop(number: int, frame: object) -> None:
    for each in ENDING:
        signal.signal(each, signal.SIG_IGN)  # nothing may cut short what takes the settings back
    raise SystemExit(stage_runner.stopped(number))


@contextmanager
def _alone() -> Iterator[None]:
    """Keep other runs out of this folder: their stages read params.yaml when they start, and must find their own."""
    with ownership.exclusive_lock(stage_runner.RUNS, dvc.BUSY):
        for lock in sorted(stage_runner.RUNS.glob("*/lock")):
            if holder := ownership.owner(lock.parent):  # started by dvc repro, or by hand
                raise UserError(f"{dvc.BUSY}: {holder}.", where=lock, fix=ownership.WAIT, code=3)
        yield


def compose(overrides: Sequence[str]) -> tuple[dict[str, Any], Params]:
    """Compose conf/ with overrides; return the contents of params.yaml, and the settings they hold."""
    from pipeline.compose import compose_params

    data = compose_params(overrides)
    return data, params.check(data, params_header.describe_source(overrides))


def config(overrides: Sequence[str], *, write: bool) -> int:
    """Print what conf/ composes to, or put it into params.yaml."""
    from pipeline.compose import to_yaml

    data, _ = compose(overrides)
    if not write:
        print(to_yaml(data, overrides), end="")
        return 0
    with _alone():
        params_header.warn_reverted_overrides(overrides, data)
        params.write(to_yaml(data, overrides).encode())
    return 0


@contextmanager
def _settings(overrides: Sequence[str], *, keep: bool) -> Iterator[Params]:
    """Put composed settings in params.yaml, where DVC looks for them.

    They are taken back unless they are to be kept, and when something is refused before it has begun.
    """
    if not overrides:
        settings = params.load()
        params_header.warn_drift()
        yield settings
        return
    from pipeline.compose import to_yaml

    data, settings = compose(overrides)
    params_header.warn_reverted_overrides(overrides, data)
    before = params.FILE.read_bytes() if params.FILE.is_file() else None
    time = params.FILE.stat().st_mtime_ns if before is not None else 0
    try:
        params.write(to_yaml(data, overrides).encode())
        yield settings
        kept = keep
    except BaseException:
        kept = False
        raise
    finally:
        if not kept:
            _take_back(before, time)


def _take_back(before: bytes | None, time: int) -> None:
    if before is None:
        params.FILE.unlink()
    else:
        params.write(before)
        os.utime(params.FILE, ns=(time, time))  # what is newer in conf/ is still to be noticed


class _Failed(Exception):
    """Tells the tracked run that DVC did not get to the end."""


def _reproduce(
    settings: Params,
    stages: Mapping[str, dvc_yaml.Stage],
    targets: Sequence[str],
    why: Mapping[str, Sequence[str]],
    *,
    force: bool,
    only: bool,
    pull: bool,
) -> int:
    outcome = dvc.Outcome()
    with shared_cluster.SharedCluster() as meeting:
        try:
            with _tracked(settings) as parent:
                environment = {**os.environ, **parent, shared_cluster.FOLDER: str(meeting.folder)}
                if force:
                    environment[stage_runner.FORCE_RESTART] = "1"
                outcome = dvc.reproduce(
                    targets, stages=stages, why=why, environment=environment, force=force, only=only, pull=pull
                )
                _link(outcome, settings, stages, parent)
                if not outcome.stopped:
                    _require_cached(outcome)
                if outcome.status or outcome.stopped:
                    raise _Failed(f"dvc repro ended with status {outcome.status}")
        except _Failed:
            if outcome.stopped:
                return stage_runner.stopped(outcome.stopped)
            if outcome.status < 0:  # it could say nothing itself
                raise UserError(
                    f"DVC was ended by {signal.Signals(-outcome.status).name}.",
                    where=Path.cwd(),
                    fix="Run the same command again; it goes on from what is saved.",
                ) from None
            if told := meeting.status():
                return told
            print("DVC did not get to the end. The same command goes on from what is saved.", file=sys.stderr)
            return 1
    _tidy(outcome, settings, stages)
    report = Path("artifacts/report/report.html")
    if report.is_file() and (not targets or "evaluate" in targets):
        print(f"report        {report}")
    return 0


def _require_cached(outcome: dvc.Outcome) -> None:
    """Refuse to have finished while what was made lies in artifacts/ alone."""
    finished = outcome.ran[:-1] if outcome.status else outcome.ran
    try:
        lacking = dvc.uncached(finished)
    except UserError as error:  # another dvc may be at work: no reason to fail what is done
        print(f"note: whether DVC's cache has what was made is not known. {error.what}", file=sys.stderr)
        return
    if lacking:
        raise UserError(
            f"DVC's cache lacks what {params_header.first_few(lacking)} made; DVC says above why. It lies in artifacts/ alone.",
            where=f"{Path.cwd()}: dvc cache dir",
            fix="Make room there, but not in artifacts/ or runs/, then run: dvc commit -f " + " ".join(lacking),
            code=3,
        )


@contextmanager
def _tracked(settings: Params) -> Iterator[dict[str, str]]:
    """Record this run as the parent of its stages'; yield the environment that tells them so."""
    from stages.tracking import tracker

    command = " ".join(["vqvae2", *sys.argv[1:]])
    with tracker.parent_run(params.flat(settings), {"command": command, "mlflow.runName": command}) as key:
        yield {tracker.PARENT: key}


def _link(
    outcome: dvc.Outcome, settings: Params, stages: Mapping[str, dvc_yaml.Stage], parent: Mapping[str, str]
) -> None:
    """Show the stages that did not run in the tracked run too, so that comparing runs finds no holes."""
    from stages.tracking import tracker

    for stage in (stages[name] for name in (*outcome.kept, *outcome.restored) if name in stages):
        with suppress(UserError):  # an input is gone, so nobody can say which run made the output
            inputs, fingerprint = _made_of(stage, settings)
            tracker.link_cached(
                parent[tracker.PARENT],
                stage.name,
                fingerprint,
                params=params.flat(sections_of(stage, settings)),
                inputs=inputs,
                metrics=Path(stage.metrics[0]) if stage.metrics else None,
                curves=curves.read(Path(stage.outs[0], curves.FILE)),
            )


def _tidy(outcome: dvc.Outcome, settings: Params, stages: Mapping[str, dvc_yaml.Stage]) -> None:
    """Remove what is of no more use once DVC has taken note of the whole: its parts, and that it was begun afresh."""
    for stage in (stages[name] for name in outcome.ran if name in stages):
        with suppress(UserError):  # an input is gone already
            work = stage_runner.RUNS / stage.cli_name / _made_of(stage, settings)[1][:16]
            shutil.rmtree(work / "parts", ignore_errors=True)
            (work / stage_runner.RESTARTED_MARKER).unlink(missing_ok=True)


def _made_of(stage: dvc_yaml.Stage, settings: Params) -> tuple[dict[str, str], str]:
    """Digest the inputs of a stage, and name by its fingerprint what it makes of them."""
    inputs = digests(stage, settings)
    return inputs, fingerprint_of(stage, settings, inputs, code_of(stage))


def _remove_leftovers(settings: Params) -> None:
    """Remove priors of levels that the settings no longer have: `sample` reads the folder of all priors."""
    for folder in Path("artifacts/priors").glob("*"):
        if folder.is_dir() and folder.name not in settings.priors:
            shutil.rmtree(folder)  # DVC restores it from its cache when the level is back


def _print_plan(why: Mapping[str, Sequence[str]], stages: Mapping[str, dvc_yaml.Stage]) -> None:
    if not why:
        print("Everything is up to date.")
    for name, found in why.items():
        print(f"{stages[name].cli_name:<13} would run: {'; '.join(found)}")
    if why:
        print("A stage that has run with these very settings and inputs is restored from cache instead.")
