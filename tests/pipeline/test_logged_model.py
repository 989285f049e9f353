"""The model of a pipeline run in MLflow: logged without pickle, registered under an alias, loaded and served."""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vqvae2
from pipeline import logged_model
from pipeline.commands import promote
from stages.config import LevelRule, SampleConfig
from stages.errors import UserError
from stages.tracking import registry
from stages.tracking.mlflow_store import connect, store_uri
from stages.tracking.tracker import track_pipeline, track_stage
from stages.tracking.upload_thread import UploadTiming
from tests.mini_pipeline import MiniPipeline
from tests.screen import Screen

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run_id(finished_pipeline: MiniPipeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Id of a pipeline run with a model, in a project that is the current folder."""
    with chdir(tmp_path_factory.mktemp("project")):
        Path("params.yaml").write_text("seed: 0\n")
        screen, work = Screen(), Path("runs/evaluate/f")
        logged_model.write(work, screen, model=finished_pipeline.path("vqvae").parent, title="Shades")
        options = {"params": {}, "inputs": {}, "screen": screen, "model": work / registry.SAVED_MODEL}
        timing = UploadTiming(shutdown_timeout_s=300)  # the store is new, and a busy machine takes its time
        with (
            track_pipeline({}, {"mlflow.runName": "shades"}, timing=timing) as parent,
            track_stage("evaluate", "f" * 64, work, parent=parent, timing=timing, **options),
        ):
            pass
        assert not screen.messages
        client, experiment = connect()
        (run,) = client.search_runs([experiment], "tags.stage = 'pipeline'")
        yield run.info.run_id


@pytest.fixture(scope="module")
def model(finished_pipeline: MiniPipeline) -> vqvae2.Model:
    return vqvae2.load(finished_pipeline.path("vqvae").parent, device="cpu")


@pytest.fixture
def pyfunc(run_id: str, monkeypatch: pytest.MonkeyPatch):
    """The model as MLflow loads it, with pickle switched off."""
    import mlflow.pyfunc

    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    with registry.downloaded_model(f"runs:/{run_id}/model") as folder:
        yield mlflow.pyfunc.load_model(str(folder))


def equal(first, second) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[level], second[level]) for level in first)


def decode_png(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def test_promoted_model_is_loaded_by_its_alias(run_id: str, model, capsys):
    """It draws the same codes; another promotion of the run moves the alias and makes no other version."""
    for alias in ("challenger", "champion"):
        assert promote.run("shades", name="vqvae2", alias=alias) == 0
        assert f"shades: version 1 of vqvae2 is {alias}" in capsys.readouterr().out
    expected = model.sample_codes(3, seed=5)
    for uri in ("models:/vqvae2@champion", "models:/vqvae2/1", f"runs:/{run_id}/model"):
        loaded = vqvae2.load(uri, device="cpu")
        assert equal(loaded.sample_codes(3, seed=5), expected) and uri in repr(loaded)


def test_pyfunc_has_the_results_of_the_python_api(pyfunc, model):
    """Of every method, without pickle."""
    import pandas as pd

    samples = pyfunc.predict(pd.DataFrame({"class": ["dark", "light"]}), params={"seed": 5, "temperature": 0.7})
    codes = model.sample_codes(2, classes=["dark", "light"], seed=5, temperature=0.7)
    images = model.decode(codes, format="numpy")
    assert np.array_equal(np.stack([decode_png(row["image"]) for row in samples]), images)
    frame = pd.DataFrame({"image": [row["image"] for row in samples], "class": ["dark", "light"]})
    encoded = [json.loads(row["codes"]) for row in pyfunc.predict(frame, params={"method": "encode"})]
    assert equal(model.encode(images), {level: np.array([grid[level] for grid in encoded]) for level in codes})
    decoded = pyfunc.predict(pd.DataFrame({"codes": [row["codes"] for row in samples]}), params={"method": "decode"})
    assert [row["image"] for row in decoded] == [row["image"] for row in samples]
    scores = pyfunc.predict(frame, params={"method": "score"})
    assert [row["nats"] for row in scores] == model.score(images, labels=["dark", "light"]).per_image.tolist()


def test_logged_model_has_signature_and_example(pyfunc):
    """The example is a valid input, and parameters that are not given keep the sampling rule of the model."""
    signature, example = pyfunc.metadata.signature, pyfunc.input_example
    assert {column.name for column in signature.inputs} == {"class", "image", "codes"}
    assert {param.name: param.default for param in signature.params} == {
        "method": "sample", "seed": 0, "temperature": None, "top_k": None, "top_p": None, "guidance": None
    }  # fmt: skip
    assert decode_png(pyfunc.predict(example)[0]["image"]).shape == (16, 16, 3)


def test_pyfunc_keeps_stored_rules_of_levels(pyfunc, monkeypatch: pytest.MonkeyPatch):
    """MLflow passes a value for every parameter, also for those that are not given."""
    import pandas as pd

    model = pyfunc.unwrap_python_model().model
    monkeypatch.setattr(model, "_rule", SampleConfig(level_rules={"bottom": LevelRule(top_k=1)}))
    codes = model.sample_codes(1, classes=["dark"], seed=5)
    (row,) = pyfunc.predict(pd.DataFrame({"class": ["dark"]}), params={"seed": 5})
    assert equal(codes, {level: np.array([grid]) for level, grid in json.loads(row["codes"]).items()})
    assert not equal(codes, model.sample_codes(1, classes=["dark"], seed=5, level_rules={}))


@pytest.mark.parametrize(
    ("rows", "method", "message"),
    [
        ({"class": ["dark", ""]}, "sample", "class must have a name in all rows or in none, got 1 of 2"),
        ({"class": ["dark"]}, "encode", "column image must have a text in each of 1 rows, got 0"),
        ({"class": ["dark"]}, "paint", "method must be one of sample, encode, decode, score, got 'paint'"),
    ],
)
def test_input_that_does_not_fit_the_method_is_refused(pyfunc, rows: dict, method: str, message: str):
    """The error names the column or the method."""
    import pandas as pd

    with pytest.raises(ValueError, match=message):
        pyfunc.predict(pd.DataFrame(rows), params={"method": method})


def test_wrong_names_are_refused(run_id: str):
    """The errors have the runs that exist, and the forms of a URI."""
    with pytest.raises(
        UserError, match=rf"No pipeline run in MLflow is absent[\s\S]*Use the id of a run: {run_id[:8]}"
    ):
        promote.run("absent", name="vqvae2", alias="champion")
    with pytest.raises(UserError, match=r"--alias must be of letters, .* got 'v1'"):
        promote.run("shades", name="vqvae2", alias="v1")
    with pytest.raises(UserError, match="must be models:/NAME@ALIAS, models:/NAME/VERSION or runs:/ID/model"):
        vqvae2.load("models:/vqvae2")
    with pytest.raises(UserError, match=r"cannot be loaded from MLflow: .*absent[\s\S]*Correct the name"):
        vqvae2.load("models:/absent@champion")


def test_model_that_cannot_be_logged_does_not_fail_the_run(tmp_path: Path):
    """A message says why."""
    screen = Screen()
    logged_model.write(tmp_path / "work", screen, model=tmp_path / "absent")
    assert "The model is not uploaded to MLflow" in str(screen.messages)
    assert not (tmp_path / "work" / registry.SAVED_MODEL).exists()


def test_error_of_any_type_does_not_fail_the_run(
    finished_pipeline: MiniPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Such as a package that MLflow does not find."""

    def fail(*arguments, **options):
        (tmp_path / registry.SAVED_MODEL).mkdir()
        raise ImportError("no module named pandas")

    monkeypatch.setattr(registry, "save_model", fail)
    screen = Screen()
    logged_model.write(tmp_path, screen, model=finished_pipeline.path("vqvae").parent)
    assert "The model is not uploaded to MLflow: no module named pandas" in str(screen.messages)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_served_model_answers_a_request(run_id: str, model):
    """`mlflow models serve` draws the images that the Python API draws."""
    registry.promote(run_id, name="vqvae2", alias="served")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": store_uri()}
    environment["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    command = [
        "-m",
        "mlflow",
        "models",
        "serve",
        "-m",
        "models:/vqvae2@served",
        "--env-manager",
        "local",
        "-p",
        str(port),
    ]
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations",
        data=json.dumps({"dataframe_records": [{"class": "dark"}], "params": {"seed": 5}}).encode(),
        headers={"Content-Type": "application/json"},
    )
    server = subprocess.Popen([sys.executable, *command], env=environment, start_new_session=True)
    try:
        answer = json.loads(_answer(request, server, timeout_s=120))
    finally:
        os.killpg(server.pid, 15)
        server.wait(30)
    images = model.sample(1, classes=["dark"], seed=5, format="numpy")
    assert np.array_equal(decode_png(answer["predictions"][0]["image"]), images[0])


def _answer(request: urllib.request.Request, server: subprocess.Popen, timeout_s: float) -> bytes:
    end = time.monotonic() + timeout_s
    while True:
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return response.read()
        except (ConnectionError, urllib.error.URLError):
            assert server.poll() is None and time.monotonic() < end, "the server does not answer"
            time.sleep(0.5)
