"""Tests of tracking: runs are uploaded completely and once, and a server that does not answer delays no training."""

import hashlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import chdir
from pathlib import Path

import pytest
from PIL import Image

from stages.errors import UserError
from stages.runtime.context import work_folder_name
from stages.tracking import registry
from stages.tracking.journal import Journal, last_record, read_records
from stages.tracking.mlflow_store import (
    connect,
    create_database,
    database_uri,
    find_run_key,
    project_folder,
    store_uri,
    user_name,
)
from stages.tracking.mlflow_sync import MlflowUploader, _clean_name
from stages.tracking.pipeline_upload import register_stage
from stages.tracking.sync_runs import describe_error, sync_runs
from stages.tracking.tags import start_tags
from stages.tracking.tracker import PipelineRun, record_cached_stage, track_pipeline, track_stage
from stages.tracking.upload_thread import UploadTiming
from tests.screen import Screen

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory):
    """Database with MLflow's tables; creating them takes seconds, so tests copy it."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(autouse=True)
def project(empty_store, tmp_path):
    """Project in a temporary working folder, with an empty store."""
    with chdir(tmp_path):
        shutil.copyfile(empty_store, "mlflow.db")
        Path("params.yaml").write_text("seed: 0\n")
        yield


@pytest.fixture
def set_tracking_uri(monkeypatch):
    """Return a function that names another store for the rest of the test."""
    return lambda uri: monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)


def track(stage="vqvae", fingerprint="f" * 64, screen=None, **options):
    defaults = {"params": {"vqvae.beta": 0.25}, "inputs": {"shards": "d" * 64}, "timing": UploadTiming(interval_s=0.2)}
    work_dir = Path("runs") / stage / work_folder_name(fingerprint)
    return track_stage(stage, fingerprint, work_dir, screen=screen or Screen(), **defaults | options)


def stage_runs(uri=None):
    """Return the runs in the store, newest first, without pipeline runs."""
    return [run for run in all_runs(uri) if run.data.tags["stage"] != "pipeline"]


def all_runs(uri=None):
    store = client(uri)
    experiment = store.get_experiment_by_name("vqvae2")
    return store.search_runs([experiment.experiment_id], order_by=["start_time DESC"]) if experiment else []


def statuses_of_experiment(name):
    return [run.info.status for run in all_runs() if run.data.tags.get("experiment") == name]


def client(uri=None):
    from mlflow import MlflowClient

    return MlflowClient(uri or store_uri())


def steps(run, name, uri=None):
    """Return the steps of a metric in the store, sorted, with repeats."""
    return sorted(point.step for point in client(uri).get_metric_history(run.info.run_id, name))


def png(shade=0):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    "path", ["../../photos", "/data/my (old) photos/", "./photos", "..", "photos//cats", "../../.."]
)
def test_path_of_an_input_makes_a_valid_tag(path):
    """MLflow refuses all tags of a run if normalization of a path would change one key."""
    from mlflow.utils.validation import _validate_tag_name

    ((key, value),) = (tag for tag in start_tags("shard", "f", {}, {path: "d"}).items() if tag[0].startswith("input."))
    _validate_tag_name(_clean_name(key))
    assert value == f"d {path}"


@pytest.mark.parametrize("name", ["priors/../x", "a/./b", "/a//b/", "x" * 249 + "/y", "level?/loss"])
def test_any_name_is_made_valid_for_mlflow(name):
    """Levels and metrics may have names that MLflow does not accept."""
    from mlflow.utils.validation import _validate_metric_name

    _validate_metric_name(_clean_name(name))


def test_finished_run_is_complete_in_the_store():
    """Settings, inputs, metrics, images, artifacts and status are in the store, without a server.

    A number of the metrics file is a metric of the group before its first dot.
    """
    Path("metrics.json").write_text(json.dumps({"validation": {"top": {"mse": 0.01}}}))
    with track(metrics=Path("metrics.json"), outputs=[Path("metrics.json")]) as reporter:
        for step in range(1, 6):
            reporter.metrics({"loss/train": 1 / step, "odd@name": step}, step)
        reporter.image("levels/top", png(), 3)
        reporter.image("levels/top", png(), 5)

    (run,) = stage_runs()
    assert run.info.status == "FINISHED" and run.info.run_name == "vqvae"
    assert run.data.params == {"vqvae.beta": "0.25"}
    assert run.data.tags.items() >= {"dvc.stage": "vqvae", "fingerprint": "f" * 64, "input.shards": "d" * 64}.items()
    assert [(item.dataset.name, item.dataset.digest) for item in run.inputs.dataset_inputs] == [("shards", "d" * 36)]
    assert steps(run, "loss/train") == steps(run, "odd_name") == [1, 2, 3, 4, 5]
    assert run.data.metrics["validation/top.mse"] == 0.01
    store = client()
    assert {file.path for file in store.list_artifacts(run.info.run_id)} == {"images", "metrics.json"}
    images = [file.path for file in store.list_artifacts(run.info.run_id, "images") if file.path.endswith(".png")]
    assert [path.split("+")[:3] for path in sorted(images)] == [
        ["images/levels~top", "step", "3"],
        ["images/levels~top", "step", "5"],
    ]
    assert run.data.tags["mlflow.user"] == user_name()
    assert Path("mlflow.db").is_file() and list(Path("mlruns").rglob("metrics.json"))


def test_points_are_ordered_by_step_not_by_time():
    """If the clock is set back during a run, the newest value is still that of the last step."""
    times = iter([1000.0, 1010.0, 1020.0, 30.0, 40.0, 1050.0])  # seconds, of begin, four steps and end
    journal = Journal(Path("runs/vqvae/f/tracked/key"), clock=lambda: next(times))
    journal.begin("key", "vqvae", "f", {}, {}, inputs={}, parent="")
    for step in range(1, 5):
        journal.metrics({"loss": 1 / step}, step)
    journal.end("FINISHED")
    journal.close()
    assert sync_runs().missing_points == 0

    (run,) = stage_runs()
    assert run.info.status == "FINISHED" and run.data.metrics["loss"] == 1 / 4
    history = sorted(client().get_metric_history(run.info.run_id, "loss"), key=lambda point: point.step)
    assert [point.value for point in history] == [1 / step for step in range(1, 5)]
    assert history[2].timestamp < history[1].timestamp
    assert sync_runs().sent_points == 0


def test_run_whose_process_died_ends_at_its_last_record():
    """Not when its journal is uploaded, which may be hours later: its duration would include them."""
    times = iter([1000.0, 1010.0])  # seconds, of begin and a step
    journal = Journal(Path("runs/vqvae/f/tracked/key"), clock=lambda: next(times))
    journal.begin("key", "vqvae", "f", {}, {}, inputs={}, parent="")
    journal.metrics({"loss": 1.0}, 1)
    journal.close()
    assert sync_runs().missing_points == 0
    (run,) = stage_runs()
    assert (run.info.status, run.info.end_time) == ("KILLED", 1_010_000)
    assert last_record(journal.path)["time"] == 1010.0


def test_killed_pipeline_run_ends_with_its_last_stage():
    """Its own journal has no record between begin and end."""
    run = Journal(Path("runs/pipeline/key"), clock=lambda: 1000.0)
    run.begin("key", "pipeline", "", {}, {}, inputs={}, parent="")
    stage = Journal(Path("runs/vqvae/f/tracked/stage"), clock=lambda: 5000.0)
    stage.begin("stage", "vqvae", "f", {}, {}, inputs={}, parent="key")
    register_stage(run.folder, "vqvae", stage.folder)
    run.close()
    stage.close()
    assert sync_runs().missing_points == 0
    assert [last_record(journal.path)["time"] for journal in (run, stage)] == [5000.0, 5000.0]


def test_cached_stage_is_recorded_completely_after_an_interruption():
    """The process died before the record of the end."""
    Path("shard.json").write_text('{"images": 100}')
    with track_pipeline({"seed": 0}, {}) as parent:
        interrupted = Journal(Path(parent) / "cached" / "shard")
        interrupted.begin("other", "shard", "a" * 64, {}, {}, inputs={}, parent=Path(parent).name, cached=True)
        interrupted.close()
        for _ in range(2):  # the second time nothing changes
            record_cached_stage(parent, "shard", "a" * 64, params={}, inputs={}, metrics=Path("shard.json"))
    assert [record["kind"] for record, _ in read_records(interrupted.path)] == ["begin", "begin", "metrics", "end"]


def test_stages_of_dvc_repro_share_a_pipeline_run():
    """Stages started by `dvc repro` with the same params.yaml and commit have the same parent run, which they describe.

    Experiments of DVC have a parent each.
    """
    description = PipelineRun({"seed": 0}, {"mlflow.runName": "emoji · seed 0", "dataset": "emoji"})
    Path("vqvae.json").write_text('{"perplexity_top": 20.0, "mse": 0.1}')
    Path("prior_top.json").write_text('{"nll": 2.0}')
    with track("vqvae", parent=description, headline=[Path("vqvae.json")]):
        pass
    with track("prior_top", "e" * 64, parent=description, headline=[Path("prior_top.json")]):
        pass
    with track("vqvae", "c" * 64, parent=PipelineRun(tags={"dvc.experiment": "tidy-owl"})):
        pass

    other, prior, vqvae = stage_runs()
    parents = {run.info.run_id: run for run in all_runs() if run.data.tags["stage"] == "pipeline"}
    assert len(parents) == 2
    assert prior.data.tags["mlflow.parentRunId"] == vqvae.data.tags["mlflow.parentRunId"]
    assert other.data.tags["mlflow.parentRunId"] != vqvae.data.tags["mlflow.parentRunId"]
    parent = parents[vqvae.data.tags["mlflow.parentRunId"]]
    assert prior.info.run_name == "prior_top"
    assert (parent.info.run_name, parent.info.status) == ("emoji · seed 0", "FINISHED")
    assert parent.data.metrics == {"perplexity_top": 20.0, "nll_top": 2.0}
    assert parent.data.params == {"seed": "0", "vqvae.beta": "0.25"}
    assert parent.data.tags["dataset"] == "emoji"


def test_interrupted_creation_of_the_database_is_repeated():
    """A process killed while MLflow creates its tables leaves no database, and the next process creates all tables."""
    Path("mlflow.db").unlink()

    def interrupt(path):
        path.write_text("half of the tables")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        create_database(Path("mlflow.db"), interrupt)
    assert not Path("mlflow.db").exists() and list(Path.cwd().glob("mlflow.db.new-*"))
    store, experiment = connect()
    assert store.get_experiment(experiment).name == "vqvae2"
    assert not list(Path.cwd().glob("mlflow.db.new-*"))


def test_resumed_stage_continues_its_run():
    """After a failure the same command continues the run; repeated steps and images are uploaded once."""
    with pytest.raises(RuntimeError), track() as reporter:
        for step in range(1, 14):
            reporter.metrics({"loss": step}, step)
        reporter.image("grid", png(), 12)
        raise RuntimeError("worker lost, see s3://me:hunter2@bucket")
    (failed,) = stage_runs()
    assert failed.info.status == "FAILED" and failed.data.tags["error"] == "worker lost, see s3://***@bucket"
    with track() as reporter:
        for step in range(11, 21):
            reporter.metrics({"loss": step}, step)
        reporter.image("grid", png(), 12)

    (run,) = stage_runs()
    assert run.info.run_id == failed.info.run_id and run.info.status == "FINISHED"
    assert steps(run, "loss") == list(range(1, 21))
    assert len(client().list_artifacts(run.info.run_id, "images")) == 2  # the image and its thumbnail


def test_finished_stage_run_again_is_a_new_run():
    """A forced stage does not change the earlier run."""
    for _ in range(2):
        with track() as reporter:
            reporter.metrics({"loss": 1.0}, 1)
    assert len(stage_runs()) == 2


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), SystemExit(143)])
def test_interrupted_run_is_killed_not_failed(interruption):
    """Ctrl-C and SIGTERM give the status KILLED."""
    with pytest.raises(type(interruption)), track():
        raise interruption
    sync_runs()  # on a busy machine, the timeout of an interrupted run may be too short for the upload
    assert [run.info.status for run in stage_runs()] == ["KILLED"]


def test_sync_closes_run_of_a_killed_process():
    """After SIGKILL, `sync_runs` uploads the rest and sets the status KILLED; a second call uploads nothing."""
    script = (
        "import os, signal, time; from pathlib import Path; from stages.tracking.tracker import track_stage\n"
        "with track_stage('vqvae', 'f', Path('runs/vqvae/f'), params={}, inputs={}) as reporter:\n"
        "    for step in range(100): reporter.metrics({'loss': step}, step)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", script], env=environment).returncode == -signal.SIGKILL

    assert sync_runs().missing_points == 0
    (run,) = stage_runs()
    assert run.info.status == "KILLED" and steps(run, "loss") == list(range(100))
    result = sync_runs()
    assert (result.sent_points, result.missing_points, result.completed_runs) == (0, 0, 1)
    assert steps(run, "loss") == list(range(100))


def test_sync_skips_active_run():
    """A running process uploads its own journal, and that of a pipeline run the journals of its stages."""
    with track():
        result = sync_runs()
        assert (result.active_runs, result.completed_runs) == (1, 0)
    with track_pipeline({}, {}) as parent:
        with track("codes", "c" * 64, parent=parent):
            pass
        assert sync_runs().active_runs == 2


def test_run_deleted_while_it_goes_on_is_reported():
    """MLflow answers and refuses further metrics of that run: no server has to be started."""
    screen = Screen()
    with track(screen=screen) as reporter:
        reporter.metrics({"loss": 1.0}, 1)
        wait_until(lambda: stage_runs() and "loss" in stage_runs()[0].data.metrics)
        client().delete_run(stage_runs()[0].info.run_id)
        reporter.metrics({"loss": 0.5}, 2)
        wait_until(lambda: screen.messages)
    assert "refuses the upload" in screen.messages[0] and "active" in screen.messages[0]


def wait_until(condition, timeout_s=60):
    """Wait until a condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_run_deleted_in_mlflow_stays_deleted():
    """`sync_runs` does not create it again."""
    with track() as reporter:
        reporter.metrics({"loss": 1.0}, 1)
    client().delete_run(stage_runs()[0].info.run_id)
    assert sync_runs().missing_points == 0 and stage_runs() == []


@pytest.fixture
def silent_server():
    """Address of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


class SlowUploader(MlflowUploader):
    """Uploader that does not finish before the run has ended."""

    def flush(self):
        time.sleep(2)


def test_failure_before_the_first_metric_has_no_second_message():
    """If MLflow is slow and the run fails before it reports anything, only the run's own error is shown."""
    screen, timing = Screen(), UploadTiming(failed_shutdown_timeout_s=0.1)
    with pytest.raises(ValueError, match="a mistake"), track(screen=screen, uploader=SlowUploader, timing=timing):
        raise ValueError("a mistake")
    assert screen.messages == []


def test_silent_server_does_not_delay_training(silent_server, set_tracking_uri, monkeypatch):
    """The run starts in 10 s, reports at once, ends in 6 s and warns once; a later sync uploads everything."""
    set_tracking_uri(silent_server)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    screen, started = Screen(), time.monotonic()
    with track(screen=screen) as reporter:
        assert time.monotonic() - started < 10
        for step in range(50):
            before = time.monotonic()
            reporter.metrics({"loss": step}, step)
            assert time.monotonic() - before < 1
            time.sleep(0.1)
        before = time.monotonic()
    assert time.monotonic() - before < 6
    assert len(screen.messages) == 2
    assert "does not answer" in screen.messages[0] and "50 points are not in MLflow" in screen.messages[1]
    assert "vqvae2 sync-metrics" in screen.messages[1]

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    result = sync_runs()
    assert (result.sent_points, result.missing_points) == (50, 0)
    assert steps(stage_runs()[0], "loss") == list(range(50)) and stage_runs()[0].info.status == "FINISHED"


def test_password_of_a_server_is_not_shown(set_tracking_uri):
    """A closed port is reported at once, without the credentials in the URL."""
    set_tracking_uri("http://me:hunter2@127.0.0.1:9")
    screen = Screen()
    with track(screen=screen) as reporter:
        reporter.metrics({"loss": 1.0}, 1)
    assert screen.messages and not any("hunter2" in message for message in screen.messages)
    assert not any("hunter2" in path.read_text() for path in Path("runs").rglob("*.jsonl"))
    with pytest.raises(UserError) as caught:
        sync_runs()
    assert caught.value.code == 3 and "hunter2" not in str(caught.value)
    assert caught.value.what.startswith("MLflow does not answer: ") and caught.value.where == "http://***@127.0.0.1:9"
    assert caught.value.fix.endswith("correct MLFLOW_TRACKING_URI, then run: vqvae2 sync-metrics")


def test_pipeline_run_has_its_stages_as_children():
    """Stages are child runs, cached ones link to the run that computed them; the parent has all settings."""
    with track("shard", "a" * 64) as reporter:
        reporter.metrics({"images": 100.0}, 1)
    producer = stage_runs()[0]
    Path("shard.json").write_text('{"images": 100}')
    timing = UploadTiming(interval_s=0.2)
    with track_pipeline({"seed": 0, "vqvae.beta": 0.25}, {"experiment": "smoke"}, timing=timing) as parent:
        with track("vqvae", "b" * 64, inputs={"artifacts/shards": "2" * 64}, parent=parent) as reporter:
            reporter.metrics({"mse": 0.5}, 1)
        wait_until(lambda: statuses_of_experiment("smoke") == ["RUNNING"])  # uploaded while the run goes on
        Path("dvc.lock").write_text("after")
        record_cached_stage(
            parent,
            "shard",
            "a" * 64,
            params={"dataset.name": "x"},
            inputs={"images.zip": "1" * 64},
            metrics=Path("shard.json"),
            curves=[(1, "train/mse", 0.5), (2, "train/mse", 0.25)],
        )
        record_cached_stage(parent, "codes", "9" * 64, params={}, inputs={"artifacts/shards": "2" * 64})

    (pipeline_run,) = [run for run in all_runs() if run.data.tags.get("experiment") == "smoke"]
    children = {
        run.info.run_name: run
        for run in stage_runs()
        if run.data.tags["mlflow.parentRunId"] == pipeline_run.info.run_id
    }
    assert children.keys() == {"vqvae", "shard (cached)", "codes (cached)"}
    cached = children["shard (cached)"]
    assert cached.data.tags["cached.from"] == producer.info.run_id
    assert producer.info.run_id in cached.data.tags["mlflow.note.content"]
    assert cached.data.tags["dvc.stage"] == "shard" and cached.data.tags["input.images.zip"] == "1" * 64
    assert steps(cached, "train/mse") == [1, 2] and cached.data.metrics["train/mse"] == 0.25
    assert [item.dataset.name for item in pipeline_run.inputs.dataset_inputs] == ["images.zip"]
    assert pipeline_run.data.tags["dvc.lock"] == hashlib.sha256(b"after").hexdigest()
    assert cached.data.metrics["images"] == 100 and cached.data.params == {"dataset.name": "x"}
    assert children["codes (cached)"].data.tags["cached.from"] == "unknown"
    assert pipeline_run.data.params == {"seed": "0", "vqvae.beta": "0.25", "dataset.name": "x"}
    assert {run.info.status for run in children.values()} == {pipeline_run.info.status} == {"FINISHED"}
    assert sync_runs().sent_points == 0


def test_pipeline_run_has_headline_metrics_pictures_and_report():
    """They come from the stages that ran and from `evaluate`, also if its result is cached; all is uploaded once.

    Pictures are images at step 0, which MLflow shows side by side for several runs.
    """
    for name, shade in (("new", 1), ("newer", 2)):
        Path(f"{name}.png").write_bytes(png(shade))
    Path("report.html").write_text("<p>report</p>")
    Path("evaluate.json").write_text('{"psnr": 21.0, "ssim": 0.1}')
    Path("vqvae.json").write_text('{"psnr": 20.0, "perplexity_top": 50.0}')
    with track_pipeline({}, {}) as parent:
        pictures = {"reconstructions": Path("new.png")}
        with track("vqvae", parent=parent, headline=[Path("vqvae.json")], pictures=pictures):
            pass
        record_cached_stage(
            parent,
            "prior@top",
            "e" * 64,
            params={},
            inputs={},
            metrics=Path("vqvae.json"),
            curves=[(5, "train/nll", 2.0)],
        )
        record_cached_stage(
            parent,
            "evaluate",
            "d" * 64,
            params={},
            inputs={},
            metrics=Path("evaluate.json"),
            headline=[Path("vqvae.json"), Path("evaluate.json")],
            outputs=[Path("report.html"), Path("evaluate.json")],
            pictures={"reconstructions": Path("newer.png"), "samples": Path("absent.png")},
        )
    for path in [*Path().glob("*.png"), Path("report.html")]:
        path.unlink()  # as the next run does
    sync_runs()

    (pipeline_run,) = [run for run in all_runs() if run.data.tags["stage"] == "pipeline"]
    assert pipeline_run.data.metrics == {"psnr": 21.0, "perplexity_top": 50.0}
    store, run_id = client(), pipeline_run.info.run_id
    assert {file.path for file in store.list_artifacts(run_id)} == {"images", "report.html", "reconstructions.png"}
    images = [file.path for file in store.list_artifacts(run_id, "images") if file.path.endswith(".png")]
    assert [path.split("+")[:3] for path in images] == 2 * [["images/pictures~reconstructions", "step", "0"]]
    newest = store.download_artifacts(run_id, max(images))
    assert Image.open(newest).getpixel((0, 0)) == (2, 0, 0)
    (evaluate,) = [run for run in stage_runs() if run.data.tags["stage"] == "evaluate"]
    assert {file.path for file in store.list_artifacts(evaluate.info.run_id)} == {
        "images",
        "report.html",
        "evaluate.json",
    }


def test_interrupted_upload_of_a_model_is_repeated():
    """Until then the run has no complete model, and cannot be promoted."""
    model = Path("model")
    model.mkdir()
    for name in ("MLmodel", "weights"):
        (model / name).write_text(name)
    with track_pipeline({}, {}) as parent, track("evaluate", parent=parent, model=model):
        pass
    sync_runs()
    store = client()
    (run,) = [run for run in all_runs() if run.data.tags["stage"] == "pipeline"]
    run_id = run.info.run_id
    assert run.data.tags["vqvae2.model"] == "complete"
    (Path(run.info.artifact_uri.removeprefix("file://")) / "model/weights").unlink()
    store.delete_tag(run_id, "vqvae2.model")
    with pytest.raises(UserError, match=r"has no complete model[\s\S]*vqvae2 sync-metrics"):
        registry.promote(run_id, name="vqvae2", alias="champion")
    sync_runs()
    assert {file.path for file in store.list_artifacts(run_id, "model")} == {"model/MLmodel", "model/weights"}
    for name in (run_id, run_id[:8], run.data.tags["vqvae2.key"], run.info.run_name):
        assert registry.promote(name, name="vqvae2", alias="champion").version == "1"


def test_run_is_found_by_the_first_digits_of_its_id():
    """As printed by `vqvae2 promote`; of a run of a stage as well, if no other run has them."""
    with track_pipeline({}, {}) as parent, track("evaluate", parent=parent):
        pass
    sync_runs()
    key = Path(parent).name
    for run in all_runs():
        assert find_run_key(run.info.run_id) == find_run_key(run.info.run_id[:12]) == key
    assert find_run_key("f" * 12) == find_run_key(run.info.run_id[:5]) == ""


def test_journal_of_an_earlier_release_is_uploaded():
    """Its records lack later fields, and have final metrics instead of headline metrics."""
    folder = Path("runs/vqvae/f/tracked/key")
    folder.mkdir(parents=True)
    begin = {"key": "key", "stage": "vqvae", "fingerprint": "f", "params": {}, "tags": {}, "inputs": {}}
    records = [
        {"kind": "begin", "time": 1.0, **begin, "parent": "repro-1", "cached": False},
        {"kind": "metrics", "time": 2.0, "step": 1, "values": {"train/mse": 0.5}},
        {"kind": "end", "time": 3.0, "status": "FINISHED", "error": "", "final": {"mse": 0.5}, "outputs": []},
    ]
    (folder / "journal.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    result = sync_runs()
    assert (result.missing_points, result.error) == (0, "")
    assert [(run.data.metrics, run.info.status) for run in stage_runs()] == [({"train/mse": 0.5}, "FINISHED")]


def test_pipeline_run_is_resumed_after_a_failure():
    """The same command continues the pipeline run; a stage that ran before the failure is not shown as cached."""
    with pytest.raises(RuntimeError), track_pipeline({}, {}) as first:
        with track("vqvae", parent=first):
            pass
        raise RuntimeError("prior failed")
    with track_pipeline({}, {}) as second:
        record_cached_stage(second, "vqvae", "f" * 64, params={}, inputs={})

    assert first == second
    assert [(run.info.run_name, run.info.status) for run in stage_runs()] == [("vqvae", "FINISHED")]
    (parent,) = [run for run in all_runs() if run.data.tags["stage"] == "pipeline"]
    assert parent.info.status == "FINISHED"


def test_queued_experiment_is_tracked_in_its_project(tmp_path):
    """DVC runs a queued experiment in a temporary copy of the project; the project's own store has its run."""
    copy = tmp_path / ".dvc" / "tmp" / "exps" / "tmp1234"
    copy.mkdir(parents=True)
    with chdir(copy):
        assert project_folder() == tmp_path and store_uri() == database_uri(tmp_path / "mlflow.db")


@pytest.mark.slow
def test_concurrent_first_runs_create_one_store():
    """Four processes at once create the database, the experiment and the parent run once."""
    Path("mlflow.db").unlink()
    script = (
        "import sys; from pathlib import Path; from stages.tracking.tracker import track_stage\n"
        "stage = sys.argv[1]\n"
        "with track_stage(stage, stage, Path('runs', stage), params={}, inputs={}) as reporter:\n"
        "    reporter.metrics({'loss': 1.0}, 1)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    processes = [subprocess.Popen([sys.executable, "-c", script, f"s{n}"], env=environment) for n in range(4)]
    assert [process.wait(120) for process in processes] == [0] * 4
    assert sync_runs().missing_points == 0
    assert len(stage_runs()) == 4 and len(all_runs()) == 5


class Server:
    """MLflow server as a child process, on a free port."""

    def __init__(self, folder):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.folder, self.uri = folder, f"http://127.0.0.1:{self.port}"

    def start(self):
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        log = (self.folder / "server.log").open("a")
        self.process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True, cwd=self.folder
        )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=1)
                return
            except OSError:
                time.sleep(0.5)
        raise TimeoutError((self.folder / "server.log").read_text()[-2000:])

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.mark.slow
def test_killed_server_loses_no_point(tmp_path, set_tracking_uri, capfd):
    """Points reported before, during and after an outage are uploaded once each, and MLflow prints nothing."""
    folder = tmp_path / "server"
    folder.mkdir()
    server = Server(folder)
    server.start()
    try:
        set_tracking_uri(server.uri)
        screen = Screen()
        with track(screen=screen) as reporter:
            for step in range(60):
                before = time.monotonic()
                reporter.metrics({"loss": step, "mse": step}, step)
                reporter.image("grid", png(step), step) if step % 20 == 0 else None
                assert time.monotonic() - before < 1
                if step == 30:
                    time.sleep(2)
                    server.kill()
                time.sleep(0.1)
            before = time.monotonic()
        assert time.monotonic() - before < 6
        assert any("does not answer" in message for message in screen.messages)
        assert any("points are not in MLflow yet" in message for message in screen.messages)

        server.start()
        assert stage_runs(server.uri)[0].info.status == "RUNNING"
        result = sync_runs()
        assert result.missing_points == 0 and 0 < result.sent_points < 120
        (run,) = stage_runs(server.uri)
        assert run.info.status == "FINISHED"
        assert steps(run, "loss", server.uri) == steps(run, "mse", server.uri) == list(range(60))
        assert (
            len(client(server.uri).list_artifacts(run.info.run_id, "images")) == 6
        )  # three images and their thumbnails
        assert sync_runs().sent_points == 0
        assert capfd.readouterr().out == ""
    finally:
        server.kill()


def test_telemetry_is_off_and_timeouts_are_short():
    """A process that tracks a run sends nothing to MLflow's developers, and requests end within five seconds."""
    with track():
        pass
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert int(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]) <= 5


class RejectingUploader(MlflowUploader):
    """Uploader to a server that accepts nothing."""

    def flush(self):
        raise OSError("no room left on the server")

    def missing_points(self):
        return 0


def test_rejected_upload_is_shown_with_the_fix(capsys):
    """Stage, pipeline run and `sync_runs` show the server's reason, also if no point is missing."""
    screen = Screen()
    with track(screen=screen, uploader=RejectingUploader):
        pass
    assert screen.messages[-1].startswith(
        "The end of this run is not in MLflow yet (no room left on the server), but saved in "
    )
    assert screen.messages[-1].endswith(". To send the rest: vqvae2 sync-metrics")
    with track_pipeline({}, {}, uploader=RejectingUploader):
        pass
    message = "pipeline: MLflow has not received all of this run (no room left on the server). To send the rest: vqvae2"
    assert message in capsys.readouterr().err
    result = sync_runs(uploader=RejectingUploader)
    assert (result.error, result.missing_points) == ("no room left on the server", 0)
    assert describe_error(TimeoutError()) == "TimeoutError"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_lost_reports_are_shown_at_the_end():
    """The message has the file and the reason."""
    screen = Screen()
    with track(screen=screen) as reporter:
        journal = next(Path("runs").rglob("journal.jsonl"))
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, reporter.reporters[0]._fd)
        reporter.metrics({"loss": 1.0}, 1)
    assert any(f"of this run are lost: writing {journal} failed" in message for message in screen.messages)
    assert any("No space left on device" in message for message in screen.messages)


def test_user_without_a_name_is_tracked_by_id():
    """A container started with --user may have no name for its user id."""

    def lookup():
        raise KeyError(os.getuid())

    assert user_name(lookup) == str(os.getuid())
