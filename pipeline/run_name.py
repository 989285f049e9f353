"""Names and tags of pipeline runs in MLflow: the dataset, the preset, and what differs from the run before."""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pipeline import last_run
from pipeline.composed_from import choices_of, settings_of
from pipeline.params import look_up
from pipeline.text import format_value
from stages.config import Params
from stages.tracking import tags

MAX_LENGTH = 45  # characters of a name, the width of its column; charts show about 18 of them
SEPARATOR = " · "
EXPERIMENT_VARIABLE = "DVC_EXP_NAME"  # environment variable that `dvc exp run` sets for stages


def run_name(
    dataset: str,
    differences: Sequence[last_run.Change],
    *,
    preset: str = "",
    experiment: str = "",
    keys: Collection[str] = (),
) -> str:
    """Name a run, such as "temperature 0.8 · emoji32": first what differs, because a list of runs cuts names.

    `differences` are those from the run before, the most important one first; as many are listed as fit. Another data
    set or preset stands for all of them. `experiment` is the name of DVC's experiment, `keys` are all keys of settings.
    """
    subject = [preset] if preset.startswith(dataset) else [dataset, preset]
    if any(change.key in ("dataset", "dataset.name", "experiment") for change in differences):
        differences = []
    listed = [_format(change, keys) for change in differences]
    texts = [", ".join(listed[:count]) + _more(len(listed) - count) for count in range(len(listed), 0, -1)]
    texts.append(f"{len(listed)} changes" if len(listed) > 1 else "")
    for text in texts:
        name = SEPARATOR.join(part for part in (experiment, text, *subject) if part)
        if len(name) <= MAX_LENGTH:
            return name
    return name[: MAX_LENGTH - 1] + "…"


def _more(count: int) -> str:
    return f" +{count}" if count else ""


def _format(change: last_run.Change, keys: Collection[str]) -> str:
    """Format a change with the shortest end of its key that no other setting has, such as "temperature 0.8"."""
    steps = change.key.split(".")
    ends = [".".join(steps[start:]) for start in range(len(steps) - 1, 0, -1)]
    key = next((end for end in ends if sum(f".{other}".endswith(f".{end}") for other in keys) <= 1), change.key)
    return f"no {key}" if change.after is None else f"{key} {format_value(change.after)}".replace('"', "")


def run_tags(data: Mapping[str, Any], command: str) -> dict[str, str]:
    """Return the tags of a pipeline run that `command` starts. `data` is the content of params.yaml."""
    differences = last_run.since_last_run(data) or last_run.of_recorded_run()
    dataset = str(look_up(data, "dataset.name"))
    preset = str(choices_of(data).get("experiment", ""))
    experiment = os.environ.get(EXPERIMENT_VARIABLE, "")
    lines = ["Changes against the run before:", "", *(f"- `{change}`" for change in differences)]
    return tags.pipeline_tags(
        run_name(dataset, differences, preset=preset, experiment=experiment, keys=settings_of(data)),
        command,
        dataset=dataset,
        preset=preset,
        experiment=experiment,
        note="\n".join(lines) if differences else "",
    )


def run_params(settings: Params) -> dict[str, Any]:
    """Return the parameters of a pipeline run: all settings by full key."""
    return settings_of(asdict(settings))
