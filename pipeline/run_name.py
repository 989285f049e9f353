"""Names and tags of pipeline runs in MLflow: the data set, the preset, and what differs from the run before."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline import changes
from pipeline.params import look_up
from pipeline.text import format_value
from stages.tracking import tags

MAX_LENGTH = 40  # characters of a name; a list of runs shows little more
SEPARATOR = " · "
EXPERIMENT_VARIABLE = "DVC_EXP_NAME"  # environment variable that `dvc exp run` sets for stages


def run_name(dataset: str, differences: Sequence[changes.Change], *, preset: str = "", experiment: str = "") -> str:
    """Name a run, such as "emoji32 · sample.temperature 0.8".

    `differences` are those from the run before, the most important one first. `experiment` is the name of DVC's
    experiment. As many changes are listed as fit; another data set or preset stands for all changes.
    """
    head = [preset] if preset.startswith(dataset) else [dataset, preset]
    head = [part for part in (*head, experiment) if part]
    if any(change.key in ("dataset", "dataset.name", "experiment") for change in differences):
        differences = []
    for count in range(len(differences), 0, -1):
        more = f" +{len(differences) - count}" if count < len(differences) else ""
        for with_section in (True, False):
            listed = ", ".join(_format(change, with_section=with_section) for change in differences[:count])
            name = SEPARATOR.join([*head, listed + more])
            if len(name) <= MAX_LENGTH:
                return name
    name = SEPARATOR.join([*head, f"{len(differences)} changes"] if len(differences) > 1 else head)
    return name if len(name) <= MAX_LENGTH else name[: MAX_LENGTH - 1] + "…"


def _format(change: changes.Change, *, with_section: bool) -> str:
    key = change.key if with_section else change.key.rpartition(".")[2]
    return f"no {key}" if change.after is None else f"{key} {format_value(change.after)}".replace('"', "")


def run_tags(data: Mapping[str, Any], command: str) -> dict[str, str]:
    """Return the tags of a pipeline run that `command` starts. `data` is the content of params.yaml."""
    differences = changes.since_last_run(data) or changes.of_recorded_run()
    dataset = str(look_up(data, "dataset.name"))
    preset = str(look_up(data, f"{changes.CHOICES}experiment") or "")
    experiment = os.environ.get(EXPERIMENT_VARIABLE, "")
    lines = ["Changes against the run before:", "", *(f"- `{change}`" for change in differences)]
    return tags.pipeline_tags(
        run_name(dataset, differences, preset=preset, experiment=experiment),
        command,
        dataset=dataset,
        preset=preset,
        experiment=experiment,
        note="\n".join(lines) if differences else "",
    )
