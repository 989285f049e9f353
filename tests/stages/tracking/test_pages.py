"""Tests of the addresses of MLflow's pages."""

import json
from urllib.parse import parse_qs, urlsplit

import pytest

from stages.errors import UserError
from stages.tracking.pages import run_pages


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """Client of a new store."""
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db")


def test_pages_show_the_runs_of_the_experiment(client):
    """The pages are those of training runs, not of language models; the newest pipeline runs are compared."""
    store = client.tracking_uri
    assert run_pages("http://me:hunter2@host:5000/", store) == {"no runs yet": "http://host:5000"}

    experiment = client.create_experiment("vqvae2")
    runs = [client.create_run(experiment, start_time=n + 1, tags={"stage": "pipeline"}).info.run_id for n in range(4)]
    for name in ("psnr", "nll_other", "vqvae/mse"):
        client.log_metric(runs[-1], name, 0.5)
    client.create_run(experiment, start_time=9, tags={"stage": "vqvae"})
    pages = run_pages("http://me:hunter2@host:5000/", store, levels=["top"])

    query = "workflowType=machine_learning&viewStateShareKey=vqvae2"
    runs_page = f"http://host:5000/#/experiments/{experiment}/runs?{query}"
    assert pages["runs"] == runs_page and pages["pictures"] == f"{runs_page}&compareRunsMode=CHART"
    view = json.loads(client.get_experiment(experiment).tags["mlflow.sharedViewState.vqvae2"])
    names = ("frechet", "kid", "nll_other", "nll_top", "perplexity_top", "precision", "psnr", "recall")
    assert view["selectedColumns"] == [f"metrics.`{name}`" for name in names]
    assert view["compareRunCharts"][0]["imageKeys"] == ["pictures/samples", "pictures/reconstructions"]
    route, _, query = urlsplit(pages["last 3 runs"]).fragment.partition("?")
    values = {name: value for name, (value,) in parse_qs(query).items()}
    assert route == "/compare-runs" and json.loads(values["experiments"]) == [experiment]
    assert json.loads(values["runs"]) == runs[:0:-1]


def test_store_that_does_not_answer_is_a_user_error():
    """The error has the address without its password."""
    with pytest.raises(UserError, match="MLflow does not answer") as caught:
        run_pages("http://me:hunter2@127.0.0.1:9")
    assert caught.value.where == "http://***@127.0.0.1:9" and caught.value.code == 3
