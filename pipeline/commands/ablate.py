"""`vqvae2 ablate`: run ablations as DVC experiments, one after another, and write their tables and charts."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipeline import ablations, dvc, params, preflight, shared_cluster
from pipeline.ablations import Experiment
from pipeline.commands.run import failure_status
from pipeline.compared_runs import find_experiment
from pipeline.composed_from import describe_source
from pipeline.params_drift import repeating_overrides
from pipeline.text import wrap
from stages.errors import UserError
from stages.formats.artifact import atomic_write
from stages.tracking.tags import git


def run(names: Sequence[str], *, overrides: Sequence[str], steps: int | None, out: Path, dry_run: bool) -> int:
    """Run the variants that have no finished experiment, then write the page and the tables; return the exit status.

    The base settings are those of params.yaml, or `overrides`. Without names, variants of a frozen stage are left out.
    Raises UserError for an unknown ablation, a variant that cannot run in this project or on this machine, and a
    project without Git.
    """
    _require_commit()
    chosen = ablations.select(names, ablations.read())
    base = list(overrides) or repeating_overrides(params.read())
    planned = list(ablations.experiments(chosen, base, steps, leave_out=None if names else _warn_left_out))
    commits = {experiment.name: find_experiment(experiment.name) for experiment in planned}
    if dry_run:
        print(format_plan(planned, commits))
        return 0
    pending = {experiment.name: experiment for experiment in planned if not commits[experiment.name]}
    for experiment in pending.values():
        preflight.check(experiment.settings, list(experiment.stages), describe_source(experiment.overrides))
    status = 0
    with _cluster(planned) as (environment, stage_status):
        for number, experiment in enumerate(pending.values(), 1):
            print(f"{experiment.name} ({number} of {len(pending)}): {_changes(experiment)}", flush=True)
            if status := _run_experiment(experiment, environment, stage_status):
                break
            commits[experiment.name] = find_experiment(experiment.name)
    _write(chosen, planned, commits, base, out)
    return status


def _warn_left_out(error: ablations.FrozenStageError) -> None:
    print(f"left out: {error.what}", file=sys.stderr)


def _run_experiment(experiment: Experiment, environment: Mapping[str, str], stage_status: Callable[[], int]) -> int:
    """Run one experiment and write its time; return the exit status."""
    from pipeline import ablation_results

    started = time.monotonic()
    targets = [experiment.last_stage] if experiment.last_stage else []
    outcome = dvc.run_experiment(experiment.name, experiment.overrides, targets, environment)
    if outcome.status or outcome.stop_signal:
        return failure_status(outcome, stage_status())
    # The time is not that of the experiment if DVC has restored networks from its cache. All variants share the shards.
    seconds = {} if set(outcome.restored) - {"shard"} else {"seconds": time.monotonic() - started}
    ablation_results.write_measurements(experiment.name, seconds)
    return 0


@contextmanager
def _cluster(planned: Sequence[Experiment]) -> Iterator[tuple[dict[str, str], Callable[[], int]]]:
    """Share one Ray cluster between all experiments, if its size is that of the project's params.yaml.

    Yields the environment of the stages, and a function that returns the exit status of a failed one, 0 if unknown.
    """
    environment = dict(os.environ)
    if any(experiment.settings.cluster != params.load().cluster for experiment in planned):
        yield environment, lambda: 0  # each stage starts a cluster of its size
        return
    with shared_cluster.SharedCluster() as cluster:
        yield environment | {shared_cluster.FOLDER: str(cluster.folder)}, cluster.exit_status


def _write(
    chosen: Mapping[str, ablations.Ablation],
    planned: Sequence[Experiment],
    commits: Mapping[str, str],
    base: Sequence[str],
    out: Path,
) -> None:
    from pipeline import ablation_page, ablation_results

    results = {name: ablation_results.read(_named(planned, name), commit) for name, commit in commits.items() if commit}
    rows = [ablation_page.Row(experiment, results.get(experiment.name)) for experiment in planned]
    all_sections = ablation_page.sections(chosen, rows)
    description = " ".join(base) or "conf/"
    out.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("report.html", ablation_page.render(all_sections, description)),
        ("tables.md", ablation_page.to_markdown(all_sections, description)),
    ):
        with atomic_write(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
        print(out / name)


def _named(planned: Sequence[Experiment], name: str) -> Experiment:
    return next(experiment for experiment in planned if experiment.name == name)


def format_plan(planned: Sequence[Experiment], commits: Mapping[str, str]) -> str:
    """List the variants, their experiments, and whether these are finished."""
    lines = []
    for experiment in planned:
        state = f"finished {commits[experiment.name][:7]}" if commits[experiment.name] else "would run"
        lines.append(wrap(f"{experiment.ablation}: {experiment.variant}, {experiment.name}, {state}", "  "))
        lines.append(wrap(f"  {_changes(experiment)}", "    "))
    experiments = len(commits)
    finished = sum(map(bool, commits.values()))
    return "\n".join([*lines, f"{experiments} experiments, of which {finished} are finished."])


def _changes(experiment: Experiment) -> str:
    return " ".join(experiment.changes) or "the base settings"


def _require_commit() -> None:
    """Raise UserError without a Git commit: DVC stores experiments as commits."""
    if not git("rev-parse", "--verify", "--quiet", "HEAD"):
        raise UserError(
            "Ablations are DVC experiments, which are Git commits, and this project has none.",
            where=Path.cwd(),
            fix='Run: git init && git add --all && git commit -m "Start"',
            code=3,
        )
