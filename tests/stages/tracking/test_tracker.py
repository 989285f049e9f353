"""Runs arrive in MLflow whole and once, and a dead server costs training nothing."""

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
from pathlib import Path

import pytest
from PIL import Image

from stages.errors import UserError
from stages.tracking import mlflow_sync, tracker
from stages.tracking.mlflow_sync import project, store_uri
from stages.tracking.tracker import link_cached, open_run, parent_run, sync
from tests.screen import Screen

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory):
    """A database with MLflow's tables, which take seconds to make."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(autouse=True)
def own_project(empty_store, tmp_path, monkeypatch):
    """Each test is a project of its own, with a store of its own."""
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(empty_store, "mlflow.db")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", tracker.PARENT):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tracker, "UPLOAD_INTERVAL_S", 0.2)
    Path("params.yaml").write_text("seed: 0\n")


def track(stage="vqvae", fingerprint="f" * 64, screen=None, **more):
    defaults = {"params": {"vqvae.beta": 0.25}, "inputs": {"shards": "d" * 64}}
    work = Path("runs") / stage / fingerprint[:16]
    return open_run(stage, fingerprint, work, screen=screen or Screen(), **defaults | more)


def runs(uri=None):
    """Every run in the store, newest first, the pipeline's aside."""
    return [run for run in everything(uri) if run.data.tags["stage"] != "pipeline"]


def everything(uri=None):
    client = tracked(uri)
    experiment = client.get_experiment_by_name("vqvae2")
    return client.search_runs([experiment.experiment_id], order_by=["start_time DESC"]) if experiment else []


def tracked(uri=None):
    from mlflow import MlflowClient

    return MlflowClient(uri or store_uri())


def steps(run, name, uri=None):
    """The steps of a curve as the store has them, repeats included."""
    return sorted(point.step for point in tracked(uri).get_metric_history(run.info.run_id, name))


def png(shade=0):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


def test_a_run_arrives_whole():
    """Settings, inputs, curves, pictures, final numbers, artifacts and status are in the store, without a server."""
    Path("metrics.json").write_text(json.dumps({"validation": {"mse": 0.01}}))
    with track(metrics=Path("metrics.json"), outputs=[Path("metrics.json")]) as reporter:
        for step in range(1, 6):
            reporter.metrics({"loss/train": 1 / step, "odd@name": step}, step)
        reporter.picture("levels/top", png(), 3)
        reporter.picture("levels/top", png(), 5)

    (run,) = runs()
    assert run.info.status == "FINISHED" and run.info.run_name == "vqvae"
    assert run.data.params == {"vqvae.beta": "0.25"}
    assert run.data.tags.items() >= {"dvc.stage": "vqvae", "fingerprint": "f" * 64, "input.shards": "d" * 64}.items()
    assert [(entry.dataset.name, entry.dataset.digest) for entry in run.inputs.dataset_inputs] == [("shards", "d" * 36)]
    assert steps(run, "loss/train") == steps(run, "odd_name") == [1, 2, 3, 4, 5]
    assert run.data.metrics["final/validation.mse"] == 0.01
    client = tracked()
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"images", "metrics.json"}
    pictures = [file.path for file in client.list_artifacts(run.info.run_id, "images") if file.path.endswith(".png")]
    assert [path.split("+")[:3] for path in sorted(pictures)] == [
        ["images/levels~top", "step", "3"],
        ["images/levels~top", "step", "5"],
    ]
    assert Path("mlflow.db").is_file() and list(Path("mlruns").rglob("metrics.json"))


def test_a_clock_that_is_set_back_changes_no_order(monkeypatch):
    """Curves are ordered by steps, and the newest value is that of the last step."""
    real, shift = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + shift[0])
    with track() as reporter:
        for step in range(1, 5):
            shift[0] = -3600.0 if step > 2 else 0.0
            reporter.metrics({"loss": 1 / step}, step)
    (run,) = runs()
    assert run.info.status == "FINISHED" and run.data.metrics["loss"] == 1 / 4
    history = sorted(tracked().get_metric_history(run.info.run_id, "loss"), key=lambda point: point.step)
    assert [point.value for point in history] == [1 / step for step in range(1, 5)]
    assert history[2].timestamp < history[1].timestamp  # as the clock had it
    assert sync().missing == 0


def test_stages_of_a_bare_dvc_repro_meet_in_one_parent():
    """Without a command of ours around them, stages with one params.yaml and one commit share a pipeline run."""
    with track("vqvae") as reporter:
        reporter.metrics({"mse": 0.5}, 1)
    with track("prior@top", "e" * 64) as reporter:
        reporter.metrics({"nll": 2.0}, 1)
    Path("params.yaml").write_text("seed: 1\n")
    with track("vqvae", "c" * 64):
        pass

    other, prior, vqvae = runs()
    parents = {run.info.run_id: run for run in everything() if run.data.tags["stage"] == "pipeline"}
    assert len(parents) == 2
    assert prior.data.tags["mlflow.parentRunId"] == vqvae.data.tags["mlflow.parentRunId"]
    assert other.data.tags["mlflow.parentRunId"] != vqvae.data.tags["mlflow.parentRunId"]
    parent = parents[vqvae.data.tags["mlflow.parentRunId"]]
    assert parent.data.metrics == {"vqvae/mse": 0.5, "prior_top/nll": 2.0}
    assert parent.info.status == "FINISHED"


def test_a_database_is_whole_or_absent(monkeypatch):
    """Killed while MLflow makes its tables, the next process makes them all; half of them would stay for ever."""
    Path("mlflow.db").unlink()
    Path("mlflow.db.new-1").write_text("half")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        mlflow_sync.connect()
    assert not Path("mlflow.db").exists()
    client, experiment = mlflow_sync.connect()
    assert client.get_experiment(experiment).name == "vqvae2"
    assert not list(Path.cwd().glob("mlflow.db.new-*"))


def test_a_resumed_stage_continues_its_run():
    """After a failure the same command goes on in the same run; repeated steps and pictures are there once."""
    with pytest.raises(RuntimeError), track() as reporter:
        for step in range(1, 14):
            reporter.metrics({"loss": step}, step)
        reporter.picture("grid", png(), 12)
        raise RuntimeError("worker lost, see s3://me:hunter2@bucket")
    (failed,) = runs()
    assert failed.info.status == "FAILED" and failed.data.tags["error"] == "worker lost, see s3://***@bucket"
    with track() as reporter:
        for step in range(11, 21):
            reporter.metrics({"loss": step}, step)
        reporter.picture("grid", png(), 12)

    (run,) = runs()
    assert run.info.run_id == failed.info.run_id and run.info.status == "FINISHED"
    assert steps(run, "loss") == list(range(1, 21))
    assert len(tracked().list_artifacts(run.info.run_id, "images")) == 2  # the picture and its thumbnail


def test_a_stage_run_again_after_it_finished_is_another_run():
    """Forcing a stage keeps the earlier run as it was."""
    for _ in range(2):
        with track() as reporter:
            reporter.metrics({"loss": 1.0}, 1)
    assert len(runs()) == 2


@pytest.mark.parametrize("signalled", [KeyboardInterrupt(), SystemExit(143)])
def test_an_interrupted_run_is_killed_not_failed(signalled):
    """Ctrl-C and SIGTERM leave the status KILLED."""
    with pytest.raises(type(signalled)), track():
        raise signalled
    sync()  # on a busy machine, the few seconds that an interrupted run waits may not do
    assert [run.info.status for run in runs()] == ["KILLED"]


def test_sync_closes_a_run_whose_process_died():
    """After a kill -9, `sync` sends what was reported and the run is no longer RUNNING; doing it again adds nothing."""
    script = (
        "import os, signal, time; from pathlib import Path; from stages.tracking.tracker import open_run\n"
        "with open_run('vqvae', 'f', Path('runs/vqvae/f'), params={}, inputs={}) as reporter:\n"
        "    for step in range(100): reporter.metrics({'loss': step}, step)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", script], env=environment).returncode == -signal.SIGKILL

    assert sync().missing == 0
    (run,) = runs()
    assert run.info.status == "KILLED" and steps(run, "loss") == list(range(100))
    again = sync()
    assert (again.points, again.missing, again.runs) == (0, 0, 1)
    assert steps(run, "loss") == list(range(100))


def test_a_run_under_way_is_left_alone_by_sync():
    """A live process sends for itself."""
    with track():
        assert (sync().running, sync().runs) == (1, 0)


def test_a_run_deleted_in_mlflow_stays_deleted():
    """`sync` does not bring back what a person threw away."""
    with track() as reporter:
        reporter.metrics({"loss": 1.0}, 1)
    tracked().delete_run(runs()[0].info.run_id)
    assert sync().missing == 0 and runs() == []


@pytest.fixture
def silence():
    """An address that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_mistake_at_the_start_is_all_there_is_to_read(monkeypatch):
    """On a busy machine MLflow may open slowly: a run that ends before it measured anything does not speak of it."""
    monkeypatch.setattr(tracker, "IMPATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(tracker.MlflowUploader, "pump", lambda delivery: time.sleep(2))
    screen = Screen()
    with pytest.raises(ValueError, match="a mistake"), track(screen=screen):
        raise ValueError("a mistake")
    assert screen.notes == []


def test_a_server_that_never_answers_costs_training_nothing(silence, monkeypatch):
    """Opening takes under 10 s, no report and no end takes over 5, it is said once, and later nothing is missing."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", silence)
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
    assert len(screen.notes) == 2
    assert "does not answer" in screen.notes[0] and "50 points are not in MLflow" in screen.notes[1]
    assert "vqvae2 sync-metrics" in screen.notes[1]

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    sent = sync()
    assert (sent.points, sent.missing) == (50, 0)
    assert steps(runs()[0], "loss") == list(range(50)) and runs()[0].info.status == "FINISHED"


def test_passwords_of_a_server_are_not_shown(monkeypatch):
    """A closed port is told at once, without the credentials in its address."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@127.0.0.1:9")
    screen = Screen()
    with track(screen=screen) as reporter:
        reporter.metrics({"loss": 1.0}, 1)
    assert screen.notes and not any("hunter2" in note for note in screen.notes)
    assert not any("hunter2" in path.read_text() for path in Path("runs").rglob("*.jsonl"))
    with pytest.raises(UserError) as caught:
        sync()
    assert caught.value.code == 3 and "hunter2" not in str(caught.value)
    assert caught.value.what.startswith("MLflow does not answer: ") and caught.value.where == "http://***@127.0.0.1:9"
    assert caught.value.fix.endswith("correct MLFLOW_TRACKING_URI; then run: vqvae2 sync-metrics")


def test_a_pipeline_run_has_its_stages_as_children(monkeypatch):
    """Each stage is a child; what did not run is a child with a link; the parent has every stage's numbers."""
    with track("shard", "a" * 64) as reporter:
        reporter.metrics({"images": 100.0}, 1)
    maker = runs()[0]
    Path("shard.json").write_text('{"images": 100}')
    with parent_run({"seed": 0, "vqvae.beta": 0.25}, {"experiment": "smoke"}) as parent:
        monkeypatch.setenv(tracker.PARENT, parent)
        with track("vqvae", "b" * 64, inputs={"artifacts/shards": "2" * 64}) as reporter:
            reporter.metrics({"mse": 0.5}, 1)
        assert [run.info.status for run in everything() if run.data.tags.get("experiment") == "smoke"] == ["RUNNING"]
        Path("dvc.lock").write_text("after")
        link_cached(
            parent,
            "shard",
            "a" * 64,
            params={"dataset.name": "x"},
            inputs={"pictures.zip": "1" * 64},
            metrics=Path("shard.json"),
            curves=[(1, "train/mse", 0.5), (2, "train/mse", 0.25)],
        )
        link_cached(parent, "codes", "9" * 64, params={}, inputs={"artifacts/shards": "2" * 64})

    (tree,) = [run for run in everything() if run.data.tags.get("experiment") == "smoke"]
    children = {r.info.run_name: r for r in runs() if r.data.tags["mlflow.parentRunId"] == tree.info.run_id}
    assert children.keys() == {"vqvae", "shard (cached)", "codes (cached)"}
    cached = children["shard (cached)"]
    assert cached.data.tags["cached.from"] == maker.info.run_id
    assert maker.info.run_id in cached.data.tags["mlflow.note.content"]
    assert cached.data.tags["dvc.stage"] == "shard" and cached.data.tags["input.pictures.zip"] == "1" * 64
    assert steps(cached, "train/mse") == [1, 2] and cached.data.metrics["train/mse"] == 0.25
    assert [found.dataset.name for found in tree.inputs.dataset_inputs] == ["pictures.zip"]
    assert tree.data.tags["dvc.lock"] == hashlib.sha256(b"after").hexdigest()
    assert cached.data.metrics["final/images"] == 100 and cached.data.params == {"dataset.name": "x"}
    assert children["codes (cached)"].data.tags["cached.from"] == "unknown"
    assert tree.data.metrics == {"vqvae/mse": 0.5, "shard/images": 100}
    assert tree.data.params == {"seed": "0", "vqvae.beta": "0.25", "dataset.name": "x"}
    assert {run.info.status for run in children.values()} == {tree.info.status} == {"FINISHED"}
    assert sync().points == 0


def test_a_pipeline_run_goes_on_after_a_failure(monkeypatch):
    """The same command continues the parent, and a stage that ran before the failure is not listed as cached."""
    with pytest.raises(RuntimeError), parent_run({}, {}) as first:
        monkeypatch.setenv(tracker.PARENT, first)
        with track("vqvae"):
            pass
        raise RuntimeError("prior failed")
    with parent_run({}, {}) as second:
        link_cached(second, "vqvae", "f" * 64, params={}, inputs={})

    assert first == second
    assert [(run.info.run_name, run.info.status) for run in runs()] == [("vqvae", "FINISHED")]
    (parent,) = [run for run in everything() if run.data.tags["stage"] == "pipeline"]
    assert parent.info.status == "FINISHED"


def test_an_experiment_in_a_copy_is_tracked_in_its_project(tmp_path, monkeypatch):
    """DVC runs queued experiments in a copy that it deletes; their runs go where the project's runs are."""
    copy = tmp_path / ".dvc" / "tmp" / "exps" / "tmp1234"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    assert project() == tmp_path and store_uri() == f"sqlite:///{tmp_path}/mlflow.db"


@pytest.mark.slow
def test_processes_that_start_together_make_one_store():
    """Four first runs at once create the database, the experiment and the parent once."""
    Path("mlflow.db").unlink()
    script = (
        "import sys; from pathlib import Path; from stages.tracking.tracker import open_run\n"
        "stage = sys.argv[1]\n"
        "with open_run(stage, stage, Path('runs', stage), params={}, inputs={}) as reporter:\n"
        "    reporter.metrics({'loss': 1.0}, 1)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    started = [subprocess.Popen([sys.executable, "-c", script, f"s{n}"], env=environment) for n in range(4)]
    assert [process.wait(120) for process in started] == [0] * 4
    assert sync().missing == 0
    assert len(runs()) == 4 and len(everything()) == 5


class Server:
    """An MLflow server as a child process, on a port of its own."""

    def __init__(self, folder):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.folder, self.uri = folder, f"http://127.0.0.1:{self.port}"

    def start(self):
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        log = (self.folder / "server.log").open("a")
        self.process = subprocess.Popen(
            command, env=os.environ | quiet, stdout=log, stderr=log, start_new_session=True, cwd=self.folder
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
def test_a_server_killed_in_the_middle_loses_no_point(tmp_path, monkeypatch, capfd):
    """Metrics reported before, during and after an outage are all there afterwards, each once; nothing is chatted."""
    folder = tmp_path / "server"
    folder.mkdir()
    server = Server(folder)
    server.start()
    try:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        screen = Screen()
        with track(screen=screen) as reporter:
            for step in range(60):
                before = time.monotonic()
                reporter.metrics({"loss": step, "mse": step}, step)
                reporter.picture("grid", png(step), step) if step % 20 == 0 else None
                assert time.monotonic() - before < 1
                if step == 30:
                    time.sleep(2)
                    server.kill()
                time.sleep(0.1)
            before = time.monotonic()
        assert time.monotonic() - before < 6
        assert any("does not answer" in note for note in screen.notes)
        assert any("points are not in MLflow yet" in note for note in screen.notes)

        server.start()
        assert runs(server.uri)[0].info.status == "RUNNING"
        sent = sync()
        assert sent.missing == 0 and 0 < sent.points < 120
        (run,) = runs(server.uri)
        assert run.info.status == "FINISHED"
        assert steps(run, "loss", server.uri) == steps(run, "mse", server.uri) == list(range(60))
        assert len(tracked(server.uri).list_artifacts(run.info.run_id, "images")) == 6  # three, and their thumbnails
        assert sync().points == 0
        assert capfd.readouterr().out == ""
    finally:
        server.kill()


def test_nothing_is_told_to_anybody_else():
    """MLflow's telemetry is off in a process that tracks, and no request waits for long."""
    with track():
        pass
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert int(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]) <= 5


def test_what_a_server_refuses_is_told_with_what_to_do(monkeypatch, capsys):
    """Of a stage, of the pipeline's run, and of a later `sync`, whatever it was that was not taken."""

    def refuses(*_):
        raise OSError("no room left on the server")

    screen = Screen()
    monkeypatch.setattr(tracker.MlflowUploader, "pump", refuses)
    monkeypatch.setattr(tracker.MlflowUploader, "missing", lambda *_: 0)
    with track(screen=screen):
        pass
    assert screen.notes[-1].startswith(
        "The end of this run is not in MLflow yet (no room left on the server); kept in "
    )
    with parent_run({}, {}):
        pass
    said = "pipeline: MLflow lacks a part of this run (no room left on the server). Send what is missing: vqvae2"
    assert said in capsys.readouterr().err
    sent = sync()
    assert (sent.trouble, sent.missing) == ("no room left on the server", 0)
    assert tracker._reason(TimeoutError()) == "TimeoutError"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_reports_that_are_lost_are_told_at_the_end():
    """With the file that took no more, and the reason."""
    screen = Screen()
    with track(screen=screen) as reporter:
        journal = next(Path("runs").rglob("journal.jsonl"))
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, reporter.reporters[0]._file)
        reporter.metrics({"loss": 1.0}, 1)
    assert any(note.startswith(f"Some reports are lost, since {journal}") for note in screen.notes)
    assert any("No space left on device" in note for note in screen.notes)


def test_a_user_without_a_name_is_tracked_by_number(monkeypatch):
    """As in a container that was started with --user."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    with track() as reporter:
        reporter.metrics({"loss": 1.0}, 1)
    (run,) = runs()
    assert run.data.tags["mlflow.user"] == str(os.getuid()) and run.info.status == "FINISHED"
