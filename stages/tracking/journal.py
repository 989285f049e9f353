"""Append-only journal of everything a run reports: one JSON record per line, written before any upload.

    {"kind": "begin", "time": ..., "key": ..., "stage": ..., ...}          each time the run starts or resumes
    {"kind": "metrics", "time": ..., "step": 10, "values": {"loss": 0.5}}
    {"kind": "image", "time": ..., "step": 10, "name": "reconstructions", "file": "images/reconstructions/10.png"}
    {"kind": "message", "time": ..., "text": "..."}
    {"kind": "end", "time": ..., "status": "FINISHED", "headline": {"psnr": 26.6}, ...}

`time` is in seconds since 1970. Each line is one write to the operating system, so a killed process loses nothing. A
power cut may truncate the last line; readers skip it. A resumed run repeats steps, so a metric may have several values
at one step: the last one is valid. An flock on the file `lock` marks a journal in use; the kernel releases it when the
process ends.
"""

import errno
import fcntl
import json
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from stages.formats import artifact
from stages.formats.flatten import flatten_numbers
from stages.runtime.context import Reporter
from stages.tracking.headline import read_headline

JOURNAL_FILE = "journal.jsonl"
STAGES, CACHED = "stages", "cached"  # subfolders of the folder of a pipeline run
SYSTEM_PREFIX = "system/"  # of the names of system metrics, which are not results
MODEL = "model"  # folder in that of the journal, with the model of a pipeline in the form of MLflow
OUTPUTS = "outputs"  # folder in that of the journal, with copies of the files that a finished run has written
MAX_OUTPUT_BYTES = 64 * 2**20  # larger output files are not uploaded

Record = dict[str, Any]


class Journal(Reporter):
    """Reporter that appends to the journal in `folder`. Images become files in the same folder.

    A failed write raises nothing, because training must go on; `write_error` keeps the first one.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.path = folder / JOURNAL_FILE
        self.write_error: Exception | None = None
        self._clock = clock
        self._line_is_incomplete = False
        self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        size = os.fstat(self._fd).st_size
        if size and os.pread(self._fd, 1, size - 1) != b"\n":
            os.write(self._fd, b"\n")  # end a truncated line, so that the next record starts on its own line

    def begin(
        self,
        key: str,
        stage: str,
        fingerprint: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        *,
        inputs: Mapping[str, str],
        parent: str,
        parent_params: Mapping[str, Any] | None = None,
        parent_tags: Mapping[str, str] | None = None,
        cached: bool = False,
    ) -> None:
        """Record the start of a run.

        `key` identifies the run, `parent` its parent run ("" if there is none). `parent_params` and `parent_tags`
        describe a parent run without a journal. `inputs` are digests by name. `cached` marks a stage whose result was
        restored instead of computed.
        """
        self._append(
            "begin",
            key=key,
            stage=stage,
            fingerprint=fingerprint,
            params=_to_text(params),
            tags=redact_secrets(dict(tags)),
            inputs=dict(inputs),
            parent=parent,
            parent_params=_to_text(parent_params or {}),
            parent_tags=redact_secrets(dict(parent_tags or {})),
            cached=cached,
        )

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self._append("metrics", step=step, values={name: _to_json(value) for name, value in values.items()})

    def image(self, name: str, png: bytes, step: int) -> None:
        file = Path("images") / quote(name, safe="") / f"{step}.png"
        try:
            (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / file).write_bytes(png)
        except OSError as error:
            self.write_error = self.write_error or error
        else:
            self._append("image", step=step, name=name, file=file.as_posix())

    def message(self, text: str) -> None:
        self._append("message", text=redact_secrets(text))

    def end(
        self,
        status: str,
        *,
        error: str = "",
        metrics: Path | None = None,
        headline: Sequence[Path] = (),
        outputs: Sequence[Path] = (),
        pictures: Mapping[str, Path] | None = None,
        model: Path | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Record the end of a run with status FINISHED, FAILED or KILLED; `tags` override tags of the same name.

        For a finished run, the numbers in the JSON file `metrics` are reported unless the run has reported them itself,
        and the headline metrics in the files `headline` are recorded for the parent run. The files `outputs` and
        `pictures`, PNG files by name, are copied into the journal's folder, because the next run may replace them
        before they are uploaded. The files of the folder `model`, if it exists, are linked for the same reason.
        """
        headline_values: dict[str, float] = {}
        copied: list[str] = []
        copied_pictures: list[str] = []
        has_model = False
        try:
            if status == "FINISHED":
                self._report_metrics(metrics)
                headline_values = read_headline(headline)
                copied = self._copy({path.name: path for path in outputs})
                copied_pictures = self._copy({f"{name}.png": path for name, path in (pictures or {}).items()})
                has_model = self._link_model(model)
        except (OSError, ValueError) as write_error:  # the stage has succeeded even if its metrics cannot be recorded
            self.write_error = self.write_error or write_error
        self._append(
            "end",
            status=status,
            error=redact_secrets(error),
            headline={name: _to_json(value) for name, value in headline_values.items()},
            outputs=copied,
            pictures=copied_pictures,
            model=has_model,
            tags=dict(tags or {}),
        )

    def _report_metrics(self, path: Path | None) -> None:
        """Report the numbers in a JSON file that the run has not reported itself."""
        if not path or not path.is_file():
            return
        values = flatten_numbers(json.loads(path.read_bytes()))
        reported = {
            name.replace("/", ".") for name in read_points(self.path)
        }  # a curve "train/mse" ends in "train.mse"
        if missing := {name: value for name, value in values.items() if name not in reported}:
            self.metrics(missing, 0)

    def _copy(self, files: Mapping[str, Path]) -> list[str]:
        """Copy files that exist and are not too large to the folder OUTPUTS; return their names there."""
        files = {
            name: path for name, path in files.items() if path.is_file() and path.stat().st_size <= MAX_OUTPUT_BYTES
        }
        if files:
            (self.folder / OUTPUTS).mkdir(exist_ok=True)
        for name, path in files.items():
            shutil.copyfile(path, self.folder / OUTPUTS / name)
        return list(files)

    def _link_model(self, model: Path | None) -> bool:
        """Link the files of a folder into the folder MODEL, which takes no disk space; return whether there are any."""
        if model is None or not model.is_dir():
            return False
        for path in sorted(model.rglob("*")):
            target = self.folder / MODEL / path.relative_to(model)
            if path.is_file() and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                artifact.link_or_copy(path, target)
        return True

    def sync(self) -> None:
        """Wait until all records are on disk. Raises OSError if the disk fails."""
        os.fsync(self._fd)

    def close(self) -> None:
        try:
            self.sync()
        except OSError as error:
            self.write_error = self.write_error or error
        os.close(self._fd)

    def _append(self, kind: str, **fields: Any) -> None:
        line = json.dumps({"kind": kind, "time": self._clock(), **fields}, ensure_ascii=False, allow_nan=False)
        data = line.encode() + b"\n"
        if self._line_is_incomplete:
            data = b"\n" + data
        try:
            written = os.write(self._fd, data)
            self._line_is_incomplete = written < len(data)
            if self._line_is_incomplete:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:  # the disk is full; the run itself may still succeed
            self.write_error = self.write_error or error


def read_records(path: Path, offset: int = 0) -> Iterator[tuple[Record, int]]:
    """Yield each valid record from byte `offset` on, with the offset of the next record; skip invalid lines."""
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return  # truncated, or being written
            offset += len(line)
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and "kind" in record:
                yield record, offset


def read_points(path: Path) -> dict[str, dict[int, float]]:
    """Return all metrics as name -> step -> value, with the last value reported at each step."""
    curves: dict[str, dict[int, float]] = {}
    for record, _ in read_records(path):
        if record["kind"] == "metrics":
            for name, value in record["values"].items():
                curves.setdefault(name, {})[record["step"]] = float(value)
    return curves


def end_status(path: Path) -> str:
    """Return the status that a journal ends with, or "" if its process is running or ended unexpectedly."""
    return last_record(path).get("status", "")


def last_record(path: Path) -> Record:
    """Return the last valid record of a journal; empty if it has none."""
    record: Record = {}
    for record, _ in read_records(path):  # noqa: B007  # only the last record matters
        pass
    return record


@contextmanager
def resume_or_create_run(root: Path, fingerprint: str) -> Iterator[Path]:
    """Lock and yield the folder of the newest run in `root` if it can be resumed, otherwise a new folder.

    A run can be resumed if it has this fingerprint, has not finished, and no live process holds its lock.
    """
    newest = max((path.parent for path in root.glob(f"*/{JOURNAL_FILE}")), default=None)
    folder = root / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
    if newest:
        begin, _ = next(read_records(newest / JOURNAL_FILE), ({}, 0))
        if begin.get("fingerprint") == fingerprint and end_status(newest / JOURNAL_FILE) != "FINISHED":
            with try_lock(newest) as acquired:
                if acquired:
                    yield newest
                    return
    with try_lock(folder):
        yield folder


@contextmanager
def try_lock(folder: Path) -> Iterator[bool]:
    """Hold the lock of a folder during the block; yield False, without waiting, if another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def redact_secrets(value: Any) -> Any:
    """Mask credentials in URLs, and in mappings also the values of keys such as "password" or "api_key"."""
    if isinstance(value, Mapping):
        return {key: "***" if _SECRET_KEY.search(key) else redact_secrets(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact_secrets(item) for item in value]
    return _URL_CREDENTIALS.sub("://***@", value) if isinstance(value, str) else value


# A password, after the colon, may have any character, also "/" and "@". A port and a path after it are no password.
_URL_CREDENTIALS = re.compile(r"://([^/@\s]+|[^/:@\s]+:(?!\d+/)\S+)@")
_SECRET_KEY = re.compile(r"password|secret|token|credential|api_?key", re.IGNORECASE)


def _to_text(params: Mapping[str, Any]) -> dict[str, str]:
    """Return parameters as text, without secrets."""
    return dict(redact_secrets({name: str(value) for name, value in params.items()}))


def _to_json(value: float) -> float | str:
    """Return the value, or text that `float` can parse if it is infinite or NaN, which strict JSON cannot hold."""
    value = float(value)
    return value if math.isfinite(value) else str(value)
