"""Prediction for `--dry-run`: which out-of-date stages are restored from a cache or pulled instead of running.

DVC restores a stage if its command, dependencies and settings equal those of dvc.lock or of an entry of its run cache,
and the outputs are in its cache. `dvc repro --dry` compares the dependencies and settings of dvc.lock, not those that
the stage would have, so the comparison is repeated here, stage by stage: a restored stage determines the
dependencies of the next one.

    CACHE/runs/*/KEY/*           entries of the run cache, in the form of a stage in dvc.lock
    CACHE/files/md5/*            contents; the MD5 of a folder ends with `.dir` and is that of its listing
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline import dvc_yaml, finished_results, params, result_versions
from pipeline.fingerprint import work_folder
from stages.config import Params
from stages.errors import UserError

RUN, RESTORE, PULL = "would run", "would be restored from cache", "would be pulled"
UNCHANGED = "would stay unchanged"
MAX_HASHED_BYTES = 2**30  # a larger source is not read, which would take seconds

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Remote:
    """Contents of a DVC remote, as far as DVC says."""

    missing: Collection[str] = ()  # paths or MD5 of outputs in dvc.lock that neither the remote nor the cache has

    def has(self, path: str, md5: str) -> bool:
        """Return whether an output of dvc.lock is complete in the remote or in the cache."""
        return not any(name in (path, md5) or name.startswith(f"{path}/") for name in self.missing)


@dataclass
class Predictor:
    """Predictor of what happens to each stage that is out of date."""

    data: Mapping[str, Any]  # params.yaml
    settings: Params
    cache: Path
    runs: Path
    remote: Remote | None = None  # None: nothing is pulled
    # Reads the run cache of the remote into the local one, when an entry is looked for that is not there.
    fetch_run_cache: Callable[[], None] = lambda: None
    _outputs: dict[str, str] = field(default_factory=dict)  # MD5 of each path of dvc.yaml as it would be
    _is_fetched: bool = False

    def predict(
        self, stages: Mapping[str, dvc_yaml.Stage], reasons: Mapping[str, Sequence[str]], forced: Collection[str] = ()
    ) -> dict[str, str]:
        """Return RUN, RESTORE, PULL or UNCHANGED for each stage that is out of date.

        `stages` are in the order of execution.
        """
        lock = dvc_yaml.read_lock()
        actions: dict[str, str] = {}
        for name, stage in stages.items():
            if name not in reasons:
                self._outputs |= _hashes(lock.get(name, {}), "outs")
                continue
            actions[name] = UNCHANGED if stage.frozen else RUN
            if stage.frozen or name in forced:
                continue
            for entry, is_in_lock in self._matching(stage, lock):
                if action := self._available(stage, entry, lock.get(name, {})):
                    changed_outputs = (text.startswith(f"{out} ") for text in reasons[name] for out in stage.all_outs)
                    actions[name] = UNCHANGED if is_in_lock and not any(changed_outputs) else action
                    self._outputs |= _hashes(entry, "outs")
                    break
            else:
                upstream = [stages[other] for other in actions if stage.depends_on(stages[other])]
                if not upstream and (md5 := self._finished_md5(stage)):
                    actions[name] = RESTORE
                    self._outputs[stage.outs[0]] = md5
        return actions

    def _matching(self, stage: dvc_yaml.Stage, lock: Mapping[str, Entry]) -> Iterator[tuple[Entry, bool]]:
        """Yield the entries that a stage would be restored from, and whether each is that of dvc.lock."""
        if self._matches(lock.get(stage.name, {}), stage):
            yield lock[stage.name], True
        matches = self._matches_in_run_cache(stage)
        if not matches and self.remote is not None and not self._is_fetched:
            self.fetch_run_cache()
            self._is_fetched = True
            matches = self._matches_in_run_cache(stage)
        yield from ((entry, False) for entry in matches)

    def _matches_in_run_cache(self, stage: dvc_yaml.Stage) -> list[Entry]:
        return [entry for entry in _run_cache(self.cache, stage.command) if self._matches(entry, stage)]

    def _matches(self, entry: Entry, stage: dvc_yaml.Stage) -> bool:
        if entry.get("cmd") != stage.command or set(_hashes(entry, "deps")) != set(stage.deps):
            return False
        expected = {
            params.FILE.as_posix(): {key: params.look_up(self.data, key) for key in stage.params},
            result_versions.FILE.as_posix(): {
                stage.cli_name: result_versions.version_of(stage, self.settings),
            },
        }
        return entry.get("params") == expected and all(
            md5 == self._dependency(path) for path, md5 in _hashes(entry, "deps").items()
        )

    def _dependency(self, path: str) -> str:
        """Return the MD5 that a dependency would have; "" if it is unknown."""
        if path not in self._outputs:
            parts = {out: md5 for out, md5 in self._outputs.items() if out.startswith(f"{path}/")}
            is_source = not path.startswith("artifacts/")
            with suppress(*finished_results.READ_ERRORS):
                self._outputs[path] = self._source(Path(path)) if is_source else _join(path, parts, self.cache)
        return self._outputs.get(path, "")

    def _source(self, path: Path) -> str:
        """Return the MD5 of a file or folder that no stage writes; "" for a folder that DVC does not track."""
        tracked = path.with_name(f"{path.name}.dvc")
        if tracked.is_file():
            return str(params.read(tracked)["outs"][0]["md5"])
        return finished_results.md5_of(path) if path.is_file() and path.stat().st_size <= MAX_HASHED_BYTES else ""

    def _available(self, stage: dvc_yaml.Stage, entry: Entry, lock_entry: Entry) -> str:
        """Return RESTORE or PULL if the outputs of an entry are in the cache or the remote; otherwise ""."""
        outputs = _hashes(entry, "outs")
        if all(finished_results.is_cached(self.cache, md5) for md5 in outputs.values()):
            return RESTORE
        if self.remote is None:
            return ""
        # The remote is asked for outputs of dvc.lock only. Entries of a run cache are pushed with their outputs.
        locked = _hashes(lock_entry, "outs")
        asked = [out for out in stage.outs if outputs.get(out) == locked.get(out)]
        return PULL if all(self.remote.has(out, outputs.get(out, "")) for out in asked) else ""

    def _finished_md5(self, stage: dvc_yaml.Stage) -> str:
        """Return the MD5 of the finished result that the stage itself would restore; "" without one."""
        source = self.settings.dataset.source
        if source in stage.deps and Path(source).is_dir():  # its contents are not compared then
            return ""
        with suppress(UserError):
            work = work_folder(self.runs / stage.cli_name, stage, self.settings)
            return finished_results.restorable_md5(stage, work, self.cache)
        return ""


def _hashes(entry: Entry, field: str) -> dict[str, str]:
    """Return the MD5 of each path in an entry."""
    return {item["path"]: item["md5"] for item in entry.get(field, ()) if "md5" in item}


def _run_cache(cache: Path, command: str) -> Iterator[Entry]:
    """Yield the entries of a command in the run cache, newest first, as DVC prefers them."""
    files = [path for path in cache.glob("runs/??/*/*") if path.is_file()]
    for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
        with suppress(UserError, OSError):
            words = b" ".join(path.read_bytes().split())  # YAML folds long lines
            if command.encode() in words:  # parsing takes a hundred times longer
                yield params.read(path)


def _join(path: str, parts: Mapping[str, str], cache: Path) -> str:
    """Return the MD5 of a folder of outputs, computed as DVC does from their listings."""
    if not parts:
        return ""
    listing = [
        {"md5": md5, "relpath": f"{part.removeprefix(f'{path}/')}/{name}"}
        for part, part_md5 in parts.items()
        for name, md5 in finished_results.read_listing(cache, part_md5).items()
    ]
    text = json.dumps(sorted(listing, key=lambda item: item["relpath"]), sort_keys=True)
    return f"{hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()}.dir"
