"""Saved view of the runs in MLflow's web interface: names in full, headline metrics, and pictures side by side.

Without it, names are cut, metrics have no columns, and above each picture are all parameters of its run. MLflow 3 reads
the view from a tag of the experiment if the address of a page names it.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from stages.tracking.mlflow_sync import PICTURES

NAME = "vqvae2"
TAG = f"mlflow.sharedViewState.{NAME}"
QUERY = f"viewStateShareKey={NAME}"  # in the address of a page
NAME_COLUMN, TIME_COLUMN, DURATION_COLUMN = "attributes.`Run Name`", "runDateAndNestInfo", "duration"
IMAGES = (f"{PICTURES}samples", f"{PICTURES}reconstructions")
PICTURE_SECTION, METRIC_SECTION, SYSTEM_SECTION = "pictures", "Model metrics", "System metrics"


def format_view(metrics: Iterable[str], images: Sequence[str] = IMAGES) -> str:
    """Format the view of runs that have these metrics and images as the value of the tag."""
    columns = [f"metrics.`{name}`" for name in metrics]
    widths = {NAME_COLUMN: 360, TIME_COLUMN: 140, DURATION_COLUMN: 90, **dict.fromkeys(columns, 110)}
    view = {
        "selectedColumns": columns,
        "columnOrder": list(widths),
        "columnWidths": widths,
        "isAccordionReordered": True,  # pictures stay first
        "compareRunSections": [
            {**_section(PICTURE_SECTION), "columns": 1, "cardHeight": 600},
            _section(METRIC_SECTION),
            _section(SYSTEM_SECTION),
        ],
        # One table of all images and runs. MLflow would add a card of its own for each image that has none.
        "compareRunCharts": [_images(images), *({**_images([image]), "deleted": True} for image in images)],
    }
    return json.dumps(view)


def _section(name: str) -> dict[str, Any]:
    return {"uuid": name, "name": name, "display": True, "isReordered": False, "deleted": False, "isGenerated": True}


def _images(names: Sequence[str]) -> dict[str, Any]:
    return {
        "type": "IMAGE",
        "uuid": " ".join(names),
        "metricSectionId": PICTURE_SECTION,
        "imageKeys": list(names),
        "step": 0,
        "showRunParams": False,
        "deleted": False,
        "isGenerated": False,
    }
