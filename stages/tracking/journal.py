"""What a run reports, kept beside its work before anybody else hears of it: one JSON object per line, only appended.

    {"kind": "begin", "time": ..., "key": ..., "stage": ..., ...}          each time the run starts or resumes
    {"kind": "metrics", "time": ..., "step": 10, "values": {"loss": 0.5}}
    {"kind": "picture", "time": ..., "step": 10, "name": "reconstructions", "file": "pictures/reconstructions/10.png"}
    {"kind": "note", "time": ..., "text": "..."}
    {"kind": "end", "time": ..., "status": "FINISHED", "final": {...}, ...}

`time` is in seconds since 1970. A killed process loses nothing, since each line is one write to the system; a line torn
by a power cut is passed over. A resumed run repeats steps, so one name may have several values at a step: the last
holds. A kernel lock, which dies with its process, tells a journal in use from an abandoned one.
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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from stages.runtime.context import Reporter

JOURNAL = "journal.jsonl"
SYSTEM = "system/"  # names of metrics about the machine begin so
LARGEST_OUTPUT_BYTES = 64 * 2**20

Entry = dict[str, Any]


class Journal(Reporter):
    """A run's journal in `folder`, open for more. Pictures become files beside it."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.path = folder / JOURNAL
        self.failure: Exception | None = None  # the first write that failed: reports may get lost, but not silently
        self._step = 0  # the last one reported
        self._torn = False  # the last line is not whole
        self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            os.write(self._file, b"\n")  # ends a torn line, so that it spoils no other

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
        cached: bool = False,
    ) -> None:
        """Say what runs: `key` names the run and `parent` the run it belongs to, if any."""
        self._append(
            "begin",
            key=key,
            stage=stage,
            fingerprint=fingerprint,
            params=without_secrets({name: str(value) for name, value in params.items()}),
            tags=without_secrets(dict(tags)),
            inputs=dict(inputs),
            parent=parent,
            cached=cached,
        )

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self._append("metrics", step=step, values={name: _as_json(value) for name, value in values.items()})
        if not all(name.startswith(SYSTEM) for name in values):
            self._step = step

    def picture(self, name: str, png: bytes, step: int) -> None:
        file = Path("pictures") / quote(name, safe="") / f"{step}.png"
        try:
            (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / file).write_bytes(png)
        except OSError as error:
            self.failure = self.failure or error
        else:
            self._append("picture", step=step, name=name, file=file.as_posix())

    def note(self, text: str) -> None:
        self._append("note", text=without_secrets(text))

    def end(
        self,
        status: str,
        *,
        error: str = "",
        metrics: Path | None = None,
        outputs: Sequence[Path] = (),
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Say how the run ended: FINISHED, FAILED or KILLED; `tags` are those that change with it.

        A finished run's final numbers are those in the JSON file `metrics`, or else the last of each curve. Its outputs
        that are files and not huge are copied here, since the next run may replace them before they are sent.
        """
        final: dict[str, float] = {}
        kept: list[str] = []
        try:
            if status == "FINISHED":
                final = self._final(metrics)
                kept = self._keep(outputs)
        except (OSError, ValueError) as failure:  # the result stands, whatever becomes of its record
            self.failure = self.failure or failure
        self._append(
            "end",
            status=status,
            error=without_secrets(error),
            final={name: _as_json(value) for name, value in final.items()},
            outputs=kept,
            tags=dict(tags or {}),
        )

    def _final(self, metrics: Path | None) -> dict[str, float]:
        if metrics and metrics.is_file():
            final = dict(_numbers(json.loads(metrics.read_bytes())))
            self.metrics({f"final/{name}": value for name, value in final.items()}, self._step)
            return final
        curves = points(self.path)
        return {name: curve[max(curve)] for name, curve in curves.items() if not name.startswith(SYSTEM)}

    def _keep(self, outputs: Sequence[Path]) -> list[str]:
        kept = [path for path in outputs if path.is_file() and path.stat().st_size <= LARGEST_OUTPUT_BYTES]
        (self.folder / "outputs").mkdir(exist_ok=True)
        for path in kept:
            shutil.copyfile(path, self.folder / "outputs" / path.name)
        return [path.name for path in kept]

    def sync(self) -> None:
        """Wait until the disk holds every line."""
        os.fsync(self._file)

    def close(self) -> None:
        try:
            self.sync()
        except OSError as error:
            self.failure = self.failure or error
        os.close(self._file)

    def _append(self, kind: str, **fields: Any) -> None:
        line = json.dumps({"kind": kind, "time": time.time(), **fields}, ensure_ascii=False, allow_nan=False)
        data = b"\n" * self._torn + line.encode() + b"\n"
        try:
            written = os.write(self._file, data)
            self._torn = written < len(data)
            if self._torn:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:  # a full disk: the run may still end well
            self.failure = self.failure or error


def read(path: Path, offset: int = 0) -> Iterator[tuple[Entry, int]]:
    """Yield each whole entry from byte `offset` on, with the offset behind it."""
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return  # still being written, or torn
            offset += len(line)
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and "kind" in entry:
                yield entry, offset


def points(path: Path) -> dict[str, dict[int, float]]:
    """Read every curve: name -> step -> value, each step once."""
    curves: dict[str, dict[int, float]] = {}
    for entry, _ in read(path):
        if entry["kind"] == "metrics":
            for name, value in entry["values"].items():
                curves.setdefault(name, {})[entry["step"]] = float(value)
    return curves


def ending(path: Path) -> str:
    """Tell the status a journal ends with, or "" if its process is at work or ended without a word."""
    entry: Entry = {}
    for entry, _ in read(path):  # noqa: B007  # only the last counts
        pass
    return entry.get("status", "")


@contextmanager
def latest(root: Path, fingerprint: str) -> Iterator[Path]:
    """Yield, locked, the folder of the newest run in `root` if that can be continued, or else a new one.

    It can be if it has this fingerprint, did not end well, and no live process holds it.
    """
    newest = max((path.parent for path in root.glob(f"*/{JOURNAL}")), default=None)
    folder = root / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
    if newest:
        begun, _ = next(read(newest / JOURNAL), ({}, 0))
        if begun.get("fingerprint") == fingerprint and ending(newest / JOURNAL) != "FINISHED":
            with locked(newest) as ours:
                if ours:
                    yield newest
                    return
    with locked(folder):
        yield folder


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold a folder's lock; yield False at once if another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def without_secrets(value: Any) -> Any:
    """Mask passwords in addresses, and whatever a name calls secret, in text or in a mapping of text."""
    if isinstance(value, Mapping):
        return {key: "***" if _SECRET_NAME.search(key) else without_secrets(item) for key, item in value.items()}
    return _CREDENTIALS.sub("://***@", value) if isinstance(value, str) else value


_CREDENTIALS = re.compile(r"://([^/@\s]+|[^/:@\s]+:(?!\d+/)\S+)@")  # behind a colon any sign; but not behind a port
_SECRET_NAME = re.compile(r"password|secret|token|credential|api_?key", re.IGNORECASE)


def _as_json(value: float) -> float | str:
    """JSON knows no infinity: such values travel as text that `float` reads."""
    value = float(value)
    return value if math.isfinite(value) else str(value)


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Flatten nested numbers: {"a": {"b": 1}} yields ("a.b", 1.0)."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, float(value)
