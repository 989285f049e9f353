"""`vqvae2 run --dry-run`: the stages that would run, be restored or be pulled, and the duration of their last runs."""

import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from pipeline import dvc, dvc_remote, dvc_yaml, params, stage_runner
from pipeline.restore_prediction import PULL, RESTORE, RUN, UNCHANGED, Predictor, Remote
from pipeline.text import format_row, wrap
from stages.config import Params
from stages.errors import UserError
from stages.tracking.durations import last_duration_s
from stages.tracking.quantities import format_duration


def predict(
    settings: Params,
    stages: Mapping[str, dvc_yaml.Stage],
    reasons: Mapping[str, Sequence[str]],
    forced: Collection[str],
    *,
    pull: bool,
) -> dict[str, str]:
    """Predict the action of each out-of-date stage.

    If the remote cannot be queried, prints a note and assumes an empty one.
    """
    cache = dvc.cache_folder()
    if cache is None:
        return dict.fromkeys(reasons, RUN)
    data = params.read()
    if pull:
        try:
            remote = Remote(dvc_remote.missing_everywhere())
            predictor = Predictor(data, settings, cache, stage_runner.RUNS, remote, dvc_remote.fetch_run_cache)
            return predictor.predict(stages, reasons, forced)
        except UserError as error:
            print(f"note: {error.what} The prediction assumes an empty remote. {error.fix}", file=sys.stderr)
    return Predictor(data, settings, cache, stage_runner.RUNS).predict(stages, reasons, forced)


def format_plan(
    stages: Mapping[str, dvc_yaml.Stage],
    reasons: Mapping[str, Sequence[str]],
    actions: Mapping[str, str],
    runs: Path = stage_runner.RUNS,
) -> str:
    """Format one line per stage and a summary. Keys are DVC's stage names."""
    lines, total_s = [], 0.0
    for name, stage_reasons in reasons.items():
        action = actions[name]
        duration_s = last_duration_s(runs / stages[name].cli_name) if action == RUN else None
        if duration_s is not None:
            action += f" (last run took {format_duration(duration_s)})"
            total_s += duration_s
        lines.append(format_row(stages[name].cli_name, f"{action}: {dvc.summarize(stage_reasons)}"))
    counts = Counter(actions.values())
    summary = "; ".join(f"{counts[action]} {action}" for action in (RUN, PULL, RESTORE, UNCHANGED) if counts[action])
    duration = f" Their last runs took {format_duration(total_s)} in total." if total_s else ""
    return "\n".join([*lines, wrap(f"Stages: {summary}.{duration}")])
