"""A project may be in a folder of any name: its runs are tracked inside of it, although MLflow uses URIs."""

import io
import shutil
from contextlib import chdir
from pathlib import Path

import pytest
from PIL import Image

from stages.tracking.mlflow_store import connect, create_database, database_uri
from stages.tracking.sync_runs import sync_runs
from stages.tracking.tracker import track_stage
from tests.screen import Screen

NAMES = (
    "a%20b", "a%2Fb", "what?", "a#b", "a b", "it's \"quoted\"", "ünï", "-leading-dash", "[b]", "a;b&c=d", "a:b@c",
    "$HOME", "back\\slash", "~", "::", "x" * 200,
)  # fmt: skip


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory) -> Path:
    """Database with MLflow's tables; creating them takes seconds, so tests copy it."""
    project = tmp_path_factory.mktemp("store") / "a%20b?#:c \\ 'd\""
    project.mkdir()
    with chdir(project):
        create_database(project / "mlflow.db")
    assert [path.name for path in project.parent.iterdir()] == [project.name]
    return project / "mlflow.db"


@pytest.mark.parametrize("name", NAMES)
def test_runs_are_tracked_inside_of_the_project(tmp_path, empty_store, name):
    """Database, artifacts and images are in the project, and nothing appears beside it."""
    project = tmp_path / name
    project.mkdir()
    shutil.copyfile(empty_store, project / "mlflow.db")
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    with chdir(project):
        Path("metrics.json").write_text('{"mse": 0.5}')
        files = {"metrics": Path("metrics.json"), "outputs": [Path("metrics.json")]}
        with track_stage("vqvae", "f" * 64, Path("runs/x"), params={}, inputs={}, screen=Screen(), **files) as reporter:
            reporter.metrics({"loss": 1.0}, 1)
            reporter.image("sheet", image.getvalue(), 1)
        result = sync_runs()
        assert (result.missing_points, result.error) == (0, "")
        client, experiment = connect()
        (run,) = [run for run in client.search_runs([experiment]) if run.data.tags["stage"] == "vqvae"]
        assert run.data.metrics["loss"] == 1.0
        assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"images", "metrics.json"}
        assert len(list(Path("mlruns").rglob("metrics.json"))) == 1
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert database_uri(project / "mlflow.db").startswith("sqlite")
