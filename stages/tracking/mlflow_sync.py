"""Bring a journal to MLflow, again and again if need be: sending twice changes nothing.

A run is found by a key of our own before it is created. A point carries the journal's time, so that a repeated one is
the same row; a step that MLflow holds is not sent anew. The order of the journal is kept.

This is the only file that knows MLflow. Its store is MLFLOW_TRACKING_URI, or a database in the project's folder.
"""

import fcntl
import getpass
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from stages.tracking.journal import JOURNAL, SYSTEM, Entry, Journal, points, read

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as TrackedRun

PIPELINE = "pipeline"  # stands for the stage's name in a run of the whole pipeline
UNOWNED = "repro-"  # begins the key of a pipeline run that no process of its own opens and closes

SYSTEM_METRICS_INTERVAL_S = 10.0
POINTS_PER_BATCH = 1000  # MLflow's limits, as all that follow
PAIRS_PER_BATCH = 100
LONGEST_NAME, LONGEST_PARAM, LONGEST_TAG, LONGEST_DIGEST = 250, 6000, 5000, 36


def project() -> Path:
    """Find the project's folder: this one, or the one around it when DVC runs an experiment in a copy."""
    here = Path.cwd().resolve()
    for folder in here.parents:
        if folder.parts[-3:] == (".dvc", "tmp", "exps"):
            return folder.parents[2]
    return here


def store_uri() -> str:
    """Tell where runs are tracked: MLFLOW_TRACKING_URI, or a database in the project."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{project() / 'mlflow.db'}"


def prepare() -> None:
    """Import MLflow so that it is quiet, private, and gives up on a dead server soon.

    Call it before threads start: two that import the same libraries can block each other.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # two lines for each run that ends
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    import mlflow  # noqa: F401

    for name in ("mlflow", "alembic", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)


def connect() -> tuple["MlflowClient", str]:
    """Reach the store and its experiment, which are made on first use."""
    from mlflow import MlflowClient

    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "vqvae2"
    with _alone():
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            _make_database(project() / "mlflow.db")
        client = MlflowClient(store_uri())
        if experiment := client.get_experiment_by_name(name):
            return client, experiment.experiment_id
        ours = not os.environ.get("MLFLOW_TRACKING_URI")
        return client, client.create_experiment(name, (project() / "mlruns").as_uri() if ours else None)


def _make_database(path: Path) -> None:
    """Make MLflow's tables beside their place: a process killed on the way would leave a database that stays broken."""
    if path.exists():
        return
    from mlflow import MlflowClient

    for left in path.parent.glob(f"{path.name}.new-*"):
        left.unlink()
    new = path.with_name(f"{path.name}.new-{time.time_ns()}")  # MLflow takes a name it has seen for one it has made
    MlflowClient(f"sqlite:///{new}").search_experiments(max_results=1)
    new.rename(path)


@contextmanager
def _alone() -> Iterator[None]:
    """Keep other processes of this project out: two that create one database break it, and one run would double."""
    with (project() / "mlflow.db.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run under a number that has no name
        return str(os.getuid())


class MlflowUploader:
    """One journal on its way. A failure raises, and the next `pump` goes on from where it came to."""

    def __init__(self, folder: Path, *, revive: bool = True):
        """`revive` makes a run anew that was deleted in MLflow; without it, such a run stays deleted."""
        self.delivered = 0  # points, by this object
        self._folder = folder
        self._path = folder / JOURNAL
        self._revive = revive
        self._unwanted = False  # nothing of this journal belongs in MLflow
        self._offset = 0
        self._store: tuple[MlflowClient, str] | None = None
        self._run = self._parent = self._stage = ""
        self._parent_is_ours = False
        self._sent: dict[str, set[int]] = {}
        self._pictures: set[tuple[str, int]] = set()

    def flush(self) -> None:
        """Send what the journal holds beyond what was sent."""
        self._store = self._store or connect()
        waiting: dict[tuple[str, int], tuple[float, float]] = {}  # (name, step) -> value, time
        for entry, offset in read(self._path, self._offset):
            if self._unwanted:
                return
            match entry["kind"]:
                case "begin":
                    self._begin(entry)
                case "metrics":
                    for name, value in entry["values"].items():
                        waiting[_name(name), entry["step"]] = (float(value), entry["time"])
                case "picture":
                    self._picture(entry)
            if len(waiting) >= POINTS_PER_BATCH or entry["kind"] == "end":
                self._points(waiting)
                waiting.clear()
            if entry["kind"] == "end":
                self._end(entry)
            if not waiting:
                self._offset = offset
        if waiting:
            self._points(waiting)
            self._offset = offset

    def missing(self) -> int:
        """Count the points that were not sent."""
        if self._unwanted:
            return 0
        curves = points(self._path)
        return sum(len(curve.keys() - self._sent.get(_name(name), set())) for name, curve in curves.items())

    @property
    def _client(self) -> "MlflowClient":
        assert self._store is not None
        return self._store[0]

    def _begin(self, entry: Entry) -> None:
        key = f"tags.`vqvae2.key` = '{entry['key']}'"
        tags = {"stage": entry["stage"], "fingerprint": entry["fingerprint"], "cached": "no", **entry["tags"]}
        tags |= {f"input.{name}": digest for name, digest in entry["inputs"].items()}
        self._stage, self._parent_is_ours = entry["stage"], entry["parent"].startswith(UNOWNED)
        with _alone():
            if entry["parent"]:
                self._parent = tags["mlflow.parentRunId"] = self._find_parent(entry)
            if entry["cached"]:
                maker = self._find_maker(entry)
                if maker and maker.data.tags.get("mlflow.parentRunId") == self._parent:
                    self._unwanted = True  # it did run in this pipeline run, before that was resumed
                    return
                tags |= {"cached": "yes", **self._link(maker)}
            run = self._find(key)
            if run is None and not self._revive and self._find(key, deleted=True):
                self._unwanted = True
                return
            if run is None:
                run = self._create(entry["key"], entry["stage"] + " (cached)" * entry["cached"], entry["time"])
            elif run.info.run_id != self._run:
                self._recall(run)
        self._run = run.info.run_id
        self._pairs(self._run, entry["params"], tags)
        self._inputs(self._run, entry["inputs"])
        self._client.update_run(self._run, status="RUNNING")
        if self._parent:
            self._pairs(self._parent, entry["params"], {})
            # What no stage made is what the whole pipeline read.
            outside = {name: digest for name, digest in entry["inputs"].items() if not name.startswith("artifacts/")}
            self._inputs(self._parent, outside)
        if self._parent_is_ours:
            self._client.update_run(self._parent, status="RUNNING")

    def _find(self, condition: str, *, deleted: bool = False) -> "TrackedRun | None":
        from mlflow.entities import ViewType

        assert self._store is not None
        client, experiment = self._store
        view = ViewType.DELETED_ONLY if deleted else ViewType.ACTIVE_ONLY
        found = client.search_runs([experiment], condition, view, max_results=1, order_by=["start_time DESC"])
        return found[0] if found else None

    def _create(self, key: str, name: str, seconds: float) -> "TrackedRun":
        assert self._store is not None
        client, experiment = self._store
        title = f"{PIPELINE} {key}" if name == PIPELINE else name
        tags = {"vqvae2.key": key, "stage": name, "mlflow.user": _user(), "mlflow.source.name": "vqvae2"}
        return client.create_run(experiment, round(1000 * seconds), tags, title)

    def _find_parent(self, entry: Entry) -> str:
        """Find or create the run of the whole pipeline."""
        found = self._find(f"tags.`vqvae2.key` = '{entry['parent']}'")
        return (found or self._create(entry["parent"], PIPELINE, entry["time"])).info.run_id

    def _find_maker(self, entry: Entry) -> "TrackedRun | None":
        """Find the run that made what a cached stage restored."""
        return self._find(
            f"tags.stage = '{entry['stage']}' and tags.fingerprint = '{entry['fingerprint']}'"
            " and tags.cached = 'no' and attributes.status = 'FINISHED'"
        )

    def _link(self, maker: "TrackedRun | None") -> dict[str, str]:
        assert self._store is not None
        if maker is None:
            note = "Nothing ran: the result was restored. The run that made it is not in this store."
            return {"cached.from": "unknown", "mlflow.note.content": note}
        address = f"#/experiments/{self._store[1]}/runs/{maker.info.run_id}"
        note = f"Nothing ran: the result is that of [{maker.info.run_name} {maker.info.run_id[:8]}]({address})."
        return {"cached.from": maker.info.run_id, "mlflow.note.content": note}

    def _recall(self, run: "TrackedRun") -> None:
        """Learn what the run holds from before."""
        for name in run.data.metrics:
            self._sent[name] = {point.step for point in self._client.get_metric_history(run.info.run_id, name)}
        for file in self._client.list_artifacts(run.info.run_id, "images"):
            name, _, step, *_ = Path(file.path).name.split("+")
            self._pictures.add((name.replace("~", "/"), int(step)))

    def _pairs(self, run: str, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        known = self._client.get_run(run).data  # a parameter is written once: a second value would be refused
        new = [
            Param(_name(key), value[:LONGEST_PARAM]) for key, value in params.items() if _name(key) not in known.params
        ]
        marks = [RunTag(_name(key), value[:LONGEST_TAG]) for key, value in tags.items() if known.tags.get(key) != value]
        for start in range(0, max(len(new), len(marks)), PAIRS_PER_BATCH):
            part = slice(start, start + PAIRS_PER_BATCH)
            self._client.log_batch(run, params=new[part], tags=marks[part])

    def _inputs(self, run: str, inputs: Mapping[str, str]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        context = [InputTag("mlflow.data.context", "input")]
        datasets = [
            # Whole digests stand in the tags `input.NAME`.
            DatasetInput(Dataset(name, digest[:LONGEST_DIGEST], "local", json.dumps({"uri": name})), context)
            for name, digest in inputs.items()
        ]
        if datasets:
            self._client.log_inputs(run, datasets)

    def _points(self, waiting: Mapping[tuple[str, int], tuple[float, float]]) -> None:
        from mlflow.entities import Metric

        new = [
            Metric(name, value, round(1000 * seconds), step)
            for (name, step), (value, seconds) in waiting.items()
            if step not in self._sent.get(name, set())
        ]
        for start in range(0, len(new), POINTS_PER_BATCH):
            part = new[start : start + POINTS_PER_BATCH]
            self._client.log_batch(self._run, metrics=part)
            for point in part:
                self._sent.setdefault(point.key, set()).add(point.step)
            self.delivered += len(part)

    def _picture(self, entry: Entry) -> None:
        from PIL import Image

        name, step = re.sub(r"[^a-zA-Z0-9_\-./ ]", "_", _name(entry["name"])), entry["step"]
        if (name, step) in self._pictures:
            return
        with Image.open(self._folder / entry["file"], formats=["PNG"]) as image:
            image.load()
            self._client.log_image(
                self._run, image, key=name, step=step, timestamp=round(1000 * entry["time"]), synchronous=True
            )
        self._pictures.add((name, step))

    def _end(self, entry: Entry) -> None:
        from mlflow.entities import Metric

        milliseconds = round(1000 * entry["time"])
        for name in entry["outputs"]:
            self._client.log_artifact(self._run, str(self._folder / "outputs" / name))
        self._pairs(self._run, {}, entry.get("tags", {}))
        if entry["error"]:
            self._client.set_tag(self._run, "error", entry["error"][:LONGEST_TAG])
        if self._parent:
            # By these names pipeline runs compare side by side, and MLflow groups them by stage.
            final = [
                Metric(
                    _name(f"{self._stage.replace('@', '_')}/{name.replace('/', '.')}"), float(value), milliseconds, 0
                )
                for name, value in entry["final"].items()
            ]
            for start in range(0, len(final), POINTS_PER_BATCH):
                self._client.log_batch(self._parent, metrics=final[start : start + POINTS_PER_BATCH])
        self._client.set_terminated(self._run, entry["status"], milliseconds)
        if self._parent_is_ours:
            self._client.set_terminated(self._parent, entry["status"], milliseconds)


class SystemMetrics:
    """How busy processors, memory, disk, network and GPUs are, as MLflow's own monitors see it."""

    def __init__(self, journal: Journal):
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self._journal = journal
        self._monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with suppress(Exception):  # there is no GPU, or no nvidia-ml-py to ask it
            self._monitors.append(GPUMonitor())
        before = [max(curve) for name, curve in points(journal.path).items() if name.startswith(SYSTEM)]
        self._step = 1 + max(before, default=-1)
        self._next = time.monotonic() + SYSTEM_METRICS_INTERVAL_S

    def look(self) -> None:
        """Note what is to be seen, if the last look was long enough ago."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + SYSTEM_METRICS_INTERVAL_S
        values: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            values |= {SYSTEM + name: float(value) for name, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        self._journal.metrics(values, self._step)
        self._step += 1


def _name(text: str) -> str:
    """Write a name with the characters that MLflow takes."""
    return re.sub(r"[^\w/\-. :]", "_", re.sub(r"/{2,}", "/", text)).strip("/.")[:LONGEST_NAME]
