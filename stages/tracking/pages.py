"""Pages of MLflow's web interface that show the runs of this project."""

import json
from collections.abc import Iterable
from contextlib import suppress
from urllib.parse import quote, urlsplit, urlunsplit

from stages.errors import UserError
from stages.tracking import saved_view, tags
from stages.tracking.headline import headline_names
from stages.tracking.journal import redact_secrets
from stages.tracking.mlflow_store import configure_mlflow, experiment_name
from stages.tracking.mlflow_sync import PIPELINE_STAGE
from stages.tracking.sync_runs import describe_error

MAX_COMPARED_RUNS = 3
# MLflow opens on an overview of language model applications otherwise.
VIEW = "workflowType=machine_learning"


def run_pages(server: str, store: str = "", *, levels: Iterable[str] = ()) -> dict[str, str]:
    """Return what the pages at a server show, and their addresses; save the view of the runs that they show.

    `store` is the store of the runs, by default the server. The view has the headline metrics of a model with these
    `levels`, also those that no run has yet. Without runs, there is only the start page. Raises UserError if the store
    does not answer.
    """
    configure_mlflow()
    from mlflow import MlflowClient, MlflowException

    client, address = MlflowClient(store or server), _without_credentials(server)
    try:
        experiment = client.get_experiment_by_name(experiment_name())
        if experiment is None:
            return {"no runs yet": address}
        runs = client.search_runs(
            [experiment.experiment_id],
            tags.stage_condition(PIPELINE_STAGE),
            max_results=MAX_COMPARED_RUNS,
            order_by=["start_time DESC"],
        )
    except Exception as error:
        raise UserError(
            f"MLflow does not answer: {describe_error(error).rstrip('.')}.",
            where=redact_secrets(server),
            fix="Start the server or correct MLFLOW_TRACKING_URI.",
            code=3,
        ) from error
    view = VIEW
    with suppress(MlflowException):  # a user of the server may lack the permission; the pages are less clear then
        others = {name for run in runs for name in run.data.metrics if "/" not in name}
        metrics = sorted({*headline_names(levels), *others})
        client.set_experiment_tag(experiment.experiment_id, saved_view.TAG, saved_view.format_view(metrics))
        view = f"{VIEW}&{saved_view.QUERY}"
    runs_page = f"{address}/#/experiments/{experiment.experiment_id}/runs?{view}"
    pages = {"runs": runs_page, "pictures": f"{runs_page}&compareRunsMode=CHART"}
    if len(runs) > 1:
        ids = quote(json.dumps([run.info.run_id for run in runs], separators=(",", ":")))
        experiments = quote(json.dumps([experiment.experiment_id]))
        pages[f"last {len(runs)} runs"] = f"{address}/#/compare-runs?runs={ids}&experiments={experiments}&{VIEW}"
    return pages


def _without_credentials(server: str) -> str:
    parts = urlsplit(server)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])).rstrip("/")
