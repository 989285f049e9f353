"""Upload of a journal to MLflow. An upload can be repeated: it sends only what MLflow does not have.

Each run has our own key in a tag, by which the uploader looks it up before creating it. A point has the time of its
journal record, so a repeated point is the same row in MLflow. Records are uploaded in the journal's order.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from stages.tracking import tags as run_tags
from stages.tracking.journal import JOURNAL_FILE, MODEL, OUTPUTS, Record, read_points, read_records
from stages.tracking.mlflow_store import connect, store_lock, user_name

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

PIPELINE_STAGE = "pipeline"  # stage name of a run of the whole pipeline
# Prefix of the key of a pipeline run that `dvc repro` started: no process of ours opens and closes that run.
REPRO_PREFIX = "repro-"
SUMMARY_STAGE = "evaluate"  # reports on all stages before it
PICTURES = "pictures/"  # prefix of the images of a pipeline run; MLflow shows this group before the metrics

# MLflow's limits: items per request, and characters of a text.
MAX_POINTS_PER_REQUEST = 1000
MAX_PAIRS_PER_REQUEST = 100
MAX_NAME_LENGTH, MAX_PARAM_LENGTH, MAX_TAG_LENGTH, MAX_DIGEST_LENGTH = 250, 6000, 5000, 36


class MlflowUploader:
    """Uploader of one journal. After a failure, the next `flush` continues at the record that failed."""

    def __init__(self, folder: Path, *, recreate_deleted: bool = True):
        """Create an uploader. With `recreate_deleted`, it creates runs again that were deleted in MLflow."""
        self.sent_points = 0  # by this object
        self._folder = folder
        self._path = folder / JOURNAL_FILE
        self._recreate_deleted = recreate_deleted
        self._skipped = False  # this journal must not be uploaded
        self._offset = 0  # in bytes, of the first record that is not uploaded
        self._store: tuple[MlflowClient, str] | None = None  # client, experiment id
        self._run_id = self._parent_id = self._stage = ""  # the ids are those of MLflow
        self._closes_parent = self._describes_parent = False
        self._sent: dict[str, set[int]] = {}  # metric name -> steps
        self._sent_images: set[tuple[str, int]] = set()  # name, step

    def flush(self) -> None:
        """Upload the records that were added since the last call. Raises any exception of MLflow if that fails."""
        self._store = self._store or connect()
        pending: dict[tuple[str, int], tuple[float, float]] = {}  # (name, step) -> (value, time)
        for record, offset in read_records(self._path, self._offset):
            if self._skipped:
                return
            match record["kind"]:
                case "begin":
                    self._begin(record)
                case "metrics":
                    for name, value in record["values"].items():
                        pending[_metric_name(name), record["step"]] = (float(value), record["time"])
                case "image":
                    self._log_image(record)
            if len(pending) >= MAX_POINTS_PER_REQUEST or record["kind"] == "end":
                self._log_points(pending)
                pending.clear()
            if record["kind"] == "end":
                self._end(record)
            if not pending:
                self._offset = offset
        if pending:
            self._log_points(pending)
            self._offset = offset

    def missing_points(self) -> int:
        """Return the number of points in the journal that are not uploaded."""
        if self._skipped:
            return 0
        curves = read_points(self._path)
        return sum(len(curve.keys() - self._sent.get(_metric_name(name), set())) for name, curve in curves.items())

    @property
    def _client(self) -> "MlflowClient":
        assert self._store is not None
        return self._store[0]

    def _begin(self, record: Record) -> None:
        tags = run_tags.start_tags(record["stage"], record["fingerprint"], record["tags"], record["inputs"])
        self._stage, self._closes_parent = record["stage"], record["parent"].startswith(REPRO_PREFIX)
        # A cached stage has done nothing in this pipeline run, but the last stage describes the whole pipeline.
        self._describes_parent = not record["cached"] or self._stage == SUMMARY_STAGE
        with store_lock():
            if record["parent"]:
                self._parent_id = tags[run_tags.PARENT_RUN] = self._find_parent(record)
            if record["cached"]:
                producer = self._find_producer(record)
                if producer and producer.data.tags.get(run_tags.PARENT_RUN) == self._parent_id:
                    self._skipped = True  # the stage ran in this pipeline run, before the pipeline run was resumed
                    return
                tags |= self._cached_tags(producer)
            by_key = run_tags.key_condition(record["key"])
            run = self._find(by_key)
            if run is None and not self._recreate_deleted and self._find(by_key, deleted=True):
                self._skipped = True
                return
            if run is None:
                run = self._create(record["key"], record["stage"], record["time"], cached=record["cached"])
            elif run.info.run_id != self._run_id:
                self._load_sent(run)
        self._run_id = run.info.run_id
        self._log_params_and_tags(self._run_id, record["params"], tags)
        self._log_inputs(self._run_id, record["inputs"])
        self._client.update_run(self._run_id, status="RUNNING")
        if self._parent_id:
            params = record["params"] | record.get("parent_params", {})
            self._log_params_and_tags(self._parent_id, params, record.get("parent_tags", {}))
            # The inputs of the pipeline are those that no stage has written.
            external = {name: digest for name, digest in record["inputs"].items() if not name.startswith("artifacts/")}
            self._log_inputs(self._parent_id, external)
        if self._closes_parent:
            self._client.update_run(self._parent_id, status="RUNNING")

    def _find(self, condition: str, *, deleted: bool = False) -> "MlflowRun | None":
        """Return the newest run that fulfils a condition."""
        from mlflow.entities import ViewType

        assert self._store is not None
        client, experiment = self._store
        view = ViewType.DELETED_ONLY if deleted else ViewType.ACTIVE_ONLY
        runs = client.search_runs([experiment], condition, view, max_results=1, order_by=["start_time DESC"])
        return runs[0] if runs else None

    def _create(self, key: str, stage: str, start_s: float, *, cached: bool = False) -> "MlflowRun":
        assert self._store is not None
        client, experiment = self._store
        name = stage.replace("@", "_")
        tags = run_tags.creation_tags(key, stage, user_name())
        return client.create_run(experiment, round(1000 * start_s), tags, f"{name} (cached)" if cached else name)

    def _find_parent(self, record: Record) -> str:
        """Return the id of the run of the whole pipeline; create it if needed."""
        run = self._find(run_tags.key_condition(record["parent"]))
        return (run or self._create(record["parent"], PIPELINE_STAGE, record["time"])).info.run_id

    def _find_producer(self, record: Record) -> "MlflowRun | None":
        """Return the run that computed the result of a cached stage."""
        return self._find(run_tags.producer_condition(record["fingerprint"]))

    def _cached_tags(self, producer: "MlflowRun | None") -> dict[str, str]:
        """Return tags of a cached stage: the id of the run that computed its result, and a description with a link."""
        assert self._store is not None
        if producer is None:
            return run_tags.cached_tags("unknown", "The run that computed its result is not in this MLflow store.")
        address = f"#/experiments/{self._store[1]}/runs/{producer.info.run_id}"
        link = f"[{producer.info.run_name} {producer.info.run_id[:8]}]({address})"
        return run_tags.cached_tags(producer.info.run_id, f"Its result was computed by {link}.")

    def _load_sent(self, run: "MlflowRun") -> None:
        """Read from MLflow which points and images a run already has."""
        for name in run.data.metrics:
            self._sent[name] = {point.step for point in self._client.get_metric_history(run.info.run_id, name)}
        for name, step, _ in self._images(run.info.run_id):
            self._sent_images.add((name, step))

    def _log_params_and_tags(self, run_id: str, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        logged = self._client.get_run(run_id).data
        new_params = [  # MLflow rejects a second value of a parameter
            Param(_clean_name(key), value[:MAX_PARAM_LENGTH])
            for key, value in params.items()
            if _clean_name(key) not in logged.params
        ]
        new_tags = [
            RunTag(_clean_name(key), value[:MAX_TAG_LENGTH])
            for key, value in tags.items()
            if logged.tags.get(_clean_name(key)) != value
        ]
        for start in range(0, max(len(new_params), len(new_tags)), MAX_PAIRS_PER_REQUEST):
            batch = slice(start, start + MAX_PAIRS_PER_REQUEST)
            self._client.log_batch(run_id, params=new_params[batch], tags=new_tags[batch])

    def _log_inputs(self, run_id: str, inputs: Mapping[str, str]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        context = [InputTag("mlflow.data.context", "input")]
        datasets = [
            # MLflow limits a digest to 36 characters; the tags INPUT_PREFIX + name have the full digests.
            DatasetInput(Dataset(name, digest[:MAX_DIGEST_LENGTH], "local", json.dumps({"uri": name})), context)
            for name, digest in inputs.items()
        ]
        if datasets:
            self._client.log_inputs(run_id, datasets)

    def _log_points(self, pending: Mapping[tuple[str, int], tuple[float, float]]) -> None:
        from mlflow.entities import Metric

        new = [
            Metric(name, value, round(1000 * time_s), step)
            for (name, step), (value, time_s) in pending.items()
            if step not in self._sent.get(name, set())
        ]
        for start in range(0, len(new), MAX_POINTS_PER_REQUEST):
            batch = new[start : start + MAX_POINTS_PER_REQUEST]
            self._client.log_batch(self._run_id, metrics=batch)
            for point in batch:
                self._sent.setdefault(point.key, set()).add(point.step)
            self.sent_points += len(batch)

    def _log_image(self, record: Record) -> None:
        name, step = _image_name(record["name"]), record["step"]
        if (name, step) not in self._sent_images:
            self._upload_image(self._run_id, self._folder / record["file"], name, step, record["time"])
            self._sent_images.add((name, step))

    def _upload_image(self, run_id: str, path: Path, name: str, step: int, time_s: float) -> None:
        from PIL import Image

        with Image.open(path, formats=["PNG"]) as image:
            image.load()
            self._client.log_image(run_id, image, key=name, step=step, timestamp=round(1000 * time_s), synchronous=True)

    def _end(self, record: Record) -> None:
        time_ms = round(1000 * record["time"])
        for name in record["outputs"]:
            self._client.log_artifact(self._run_id, str(self._folder / OUTPUTS / name))
        self._log_params_and_tags(self._run_id, {}, record.get("tags", {}))
        if record["error"]:
            self._client.set_tag(self._run_id, run_tags.ERROR, record["error"][:MAX_TAG_LENGTH])
        if self._parent_id and self._describes_parent:
            self._describe_parent(record)
        self._client.set_terminated(self._run_id, record["status"], time_ms)
        if self._closes_parent:
            self._client.set_terminated(self._parent_id, record["status"], time_ms)

    def _describe_parent(self, record: Record) -> None:
        """Give the pipeline run the headline metrics, pictures and pages of its stage."""
        from mlflow.entities import Metric

        time_ms = round(1000 * record["time"])
        headline = record.get("headline", {})
        metrics = [Metric(_clean_name(name), float(value), time_ms, 0) for name, value in headline.items()]
        if metrics:
            self._client.log_batch(self._parent_id, metrics=metrics)
        pictures = record.get("pictures", [])
        pages = [name for name in record["outputs"] if name.endswith(".html")]
        for name in (*pages, *pictures):
            self._client.log_artifact(self._parent_id, str(self._folder / OUTPUTS / name))
        if record.get("model") and run_tags.MODEL not in self._client.get_run(self._parent_id).data.tags:
            self._client.log_artifacts(self._parent_id, str(self._folder / MODEL), MODEL)
            self._client.set_tag(self._parent_id, run_tags.MODEL, "complete")
        sent = set(self._images(self._parent_id))
        for file in pictures:
            name = _image_name(PICTURES + Path(file).stem)
            if (name, 0, time_ms) not in sent:
                self._upload_image(self._parent_id, self._folder / OUTPUTS / file, name, 0, record["time"])

    def _images(self, run_id: str) -> Iterator[tuple[str, int, int]]:
        """Yield name, step and time in ms of each image of a run."""
        for file in self._client.list_artifacts(run_id, "images"):
            # MLflow names an image NAME+step+STEP+timestamp+TIME+..., with "~" for "/".
            name, _, step, _, time_ms, *_ = Path(file.path).name.split("+")
            yield name.replace("~", "/"), int(step), int(time_ms)


def _metric_name(name: str) -> str:
    """Return a valid name in which "/" ends the first part, by which MLflow groups metrics."""
    return _clean_name(name if "/" in name else name.replace(".", "/", 1))


def _image_name(name: str) -> str:
    """Replace the characters that MLflow does not accept in the name of an image."""
    return re.sub(r"[^a-zA-Z0-9_\-./ ]", "_", _clean_name(name))


def _clean_name(text: str) -> str:
    """Make a name that MLflow accepts: a normal path of some characters, up to its limit of length."""
    parts = [part for part in re.sub(r"[^\w/\-. :]", "_", text).split("/") if part not in ("", ".", "..")]
    return "/".join(parts).strip(".")[:MAX_NAME_LENGTH].rstrip("/")
