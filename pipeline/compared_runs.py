"""Settings, numbers and pictures of a run, an experiment, a Git revision, a report folder or the workspace.

A name is looked up as a folder, a pipeline run, a DVC experiment, a Git revision and the id of a run in MLflow, in this
order. Everything is read from this machine: pictures of a revision come from DVC's cache.
"""

import ast
import io
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline import dvc, dvc_yaml, finished_results, params, unfinished_experiment
from pipeline.completion import runs as list_runs
from pipeline.last_run import Change
from pipeline.text import first_few
from stages.errors import UserError
from stages.formats.flatten import flatten, flatten_numbers
from stages.tracking.journal import JOURNAL_FILE, OUTPUTS, Record, read_points, read_records
from stages.tracking.mlflow_store import find_run_key
from stages.tracking.sync_runs import describe_error
from stages.tracking.tags import DVC_EXPERIMENT, RUN_NAME, git

WORKSPACE = "workspace"
PICTURES = ("samples", "reconstructions")  # of the report
REPORT = Path("artifacts/report")
METRICS = Path("metrics")
PIPELINE_RUNS = Path("runs/pipeline")


@dataclass(frozen=True)
class Note:
    """Remark on what is missing, and the command that provides it; "" if there is none."""

    text: str
    command: str = ""

    def __str__(self) -> str:
        return f"{self.text} {self.command}".rstrip()


@dataclass
class ComparedRun:
    """One side of a comparison."""

    name: str
    description: str
    settings: dict[str, Any]  # full key -> value
    numbers: dict[str, float]  # such as "evaluate.psnr"
    pictures: dict[str, bytes] = field(default_factory=dict)  # name -> PNG
    notes: list[Note] = field(default_factory=list)


def find(name: str, cache_folder: Callable[[], Path | None] = dvc.cache_folder) -> ComparedRun:
    """Read the run that a name stands for.

    Raises UserError if there is none, if it has no settings, or if its dvc.lock is not valid.
    """
    if name == WORKSPACE:
        return _of_project(Path(), WORKSPACE)
    folder = Path(name)
    if _is_file(folder / "report.html"):
        return _of_report(folder)
    if _is_file(folder / dvc_yaml.FILE):
        return _of_project(folder, name)
    if (key := _find_key(name)) and (run := _of_key(name, key)):
        return run
    if commit := find_experiment(name):
        return _of_revision(name, "DVC experiment", commit, cache_folder)
    if commit := git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}"):
        return _of_revision(name, "Git revision", commit, cache_folder)
    key, unanswered = "", ""
    try:
        key = find_run_key(name)
    except Exception as error:  # of any kind: MLflow's stores and servers have many
        unanswered = f" MLflow does not answer ({describe_error(error)}), so that ids of its runs are unknown."
    if key and (run := _of_key(name, key)):
        return run
    if explanation := unfinished_experiment.explain(name):
        raise explanation
    names = list(list_runs({}))
    options = (
        f"Use one of: {first_few(names, 8)}, or {WORKSPACE}"
        if names
        else "Run the pipeline first, or use the folder of a report"
    )
    raise UserError(
        f"{name} is not a run, a DVC experiment, a Git revision or a folder with a report.{unanswered}",
        where=Path.cwd(),
        fix=f"{options}.",
        code=2,
    )


def _is_file(path: Path) -> bool:
    """Return whether a path is a file; False also for a name that is too long for a path."""
    with suppress(OSError):
        return path.is_file()
    return False


def _of_project(folder: Path, name: str) -> ComparedRun:
    """Read the files of a project as they are now."""
    values = params.read(folder / params.FILE)
    stages = _stages(lambda: params.read(folder / dvc_yaml.FILE), values)
    written = metric_names(stages)
    paths = (path for path in sorted((folder / METRICS).glob("*.json")) if path.stem in written)
    run = ComparedRun(
        name, "the present files", _settings(values), _numbers({path.stem: path.read_bytes() for path in paths})
    )
    lock_file = folder / dvc_yaml.LOCK
    lock = dvc_yaml.parse_lock(params.read(lock_file), lock_file) if lock_file.is_file() else {}
    _note_outdated_numbers(run, stages, lock, values, command="vqvae2 run")
    _add_pictures(run, lambda picture: _read(folder / REPORT / picture), "To make them:", "vqvae2 run")
    return run


def _of_report(folder: Path) -> ComparedRun:
    """Read the folder of a report, and the settings and numbers of the project that it lies in."""
    project = folder.resolve().parent.parent
    if folder.resolve() == (project / REPORT) and (project / params.FILE).is_file():
        run = _of_project(project, str(folder))
        run.description = f"report of {project}"
    else:
        run = ComparedRun(
            str(folder), "report", {}, {}, notes=[Note(f"{folder} lies in no project: it has no settings.")]
        )
        with suppress(OSError, ValueError):
            run.numbers = _numbers({"evaluate": (folder / "metrics.json").read_bytes()})
    _add_pictures(run, lambda picture: _read(folder / picture), "To make them:", "vqvae2 run")
    return run


def _of_revision(name: str, kind: str, commit: str, cache_folder: Callable[[], Path | None]) -> ComparedRun:
    """Read the files of a Git commit; pictures are in DVC's cache under the MD5 of its dvc.lock."""
    if not (text := git("show", f"{commit}:./{params.FILE}")):
        raise UserError(
            f"{name} has no {params.FILE}.", where=f"commit {commit[:7]}", fix="Use a later revision.", code=2
        )
    values = params.parse(text)
    stages = _stages(lambda: params.parse(git("show", f"{commit}:./{dvc_yaml.FILE}")), values)
    files = {stem: git("show", f"{commit}:./{METRICS}/{stem}.json").encode() for stem in metric_names(stages)}
    date = git("show", "-s", "--format=%cs", commit)
    run = ComparedRun(name, f"{kind} {commit[:7]} of {date}", _settings(values), _numbers(files))
    try:
        lock = dvc_yaml.parse_lock(params.parse(git("show", f"{commit}:./{dvc_yaml.LOCK}") or "{}", dvc_yaml.LOCK))
    except UserError as error:
        raise UserError(error.what, where=f"commit {commit[:7]}", fix="Use another revision.", code=2) from error
    _note_outdated_numbers(run, stages, lock, values)
    outs = lock.get("evaluate", {}).get("outs", [])
    md5 = next((out.get("md5", "") for out in outs if out.get("path") == REPORT.as_posix()), "")
    listing: Mapping[str, str] = {}
    cache = cache_folder()
    with suppress(*finished_results.READ_ERRORS):
        listing = finished_results.read_listing(cache, md5) if cache else {}

    def read(picture: str) -> bytes:
        return _read(finished_results.cache_path(cache, listing[picture])) if cache and picture in listing else b""

    _add_pictures(run, read, "They are not in DVC's cache. To download them:", "dvc fetch --all-commits evaluate")
    return run


def metric_names(stages: Mapping[str, dvc_yaml.Stage]) -> list[str]:
    """Return the names of the files in metrics/ that stages write."""
    return [Path(path).stem for stage in stages.values() for path in stage.metrics]


def _stages(read_pipeline: Callable[[], Mapping[str, Any]], values: Mapping[str, Any]) -> Mapping[str, dvc_yaml.Stage]:
    """Return the stages of a pipeline; none if dvc.yaml is missing or not valid."""
    with suppress(UserError, OSError):
        return dvc_yaml.parse(read_pipeline(), values)
    return {}


def _note_outdated_numbers(
    run: ComparedRun,
    stages: Mapping[str, dvc_yaml.Stage],
    lock: Mapping[str, Any],
    values: Mapping[str, Any],
    command: str = "",
) -> None:
    """Add notes if numbers were computed with other settings than those of params.yaml, or from earlier inputs."""
    changes: dict[str, Change] = {}
    for name in stages.keys() & lock.keys():
        recorded = lock[name].get("params", {}).get(params.FILE.as_posix(), {})
        for section, entries in recorded.items():
            now = flatten({section: params.look_up(values, section)})
            changes |= {
                key: Change(key, before, now[key])
                for key, before in flatten({section: entries}).items()
                if key in now and before != now[key]  # absent: a setting of another release
            }
    texts = []
    if changes:
        shown = first_few([str(changes[key]) for key in sorted(changes)])
        texts.append(f"Numbers of {run.name} were computed before settings of its {params.FILE} changed: {shown}.")
    if stale := _stages_before_their_inputs(stages, lock):
        texts.append(f"Numbers of {run.name} were computed before the inputs of {first_few(stale)} changed.")
    run.notes += [Note(f"{text} To compute them:" if command else text, command) for text in texts]


def _stages_before_their_inputs(stages: Mapping[str, dvc_yaml.Stage], lock: Mapping[str, Any]) -> list[str]:
    """Return the stages whose recorded inputs are not the recorded outputs of others: a run has been interrupted."""
    outs = {out["path"]: out.get("md5") for entry in lock.values() for out in entry.get("outs", [])}
    return [
        stage.cli_name
        for name, stage in stages.items()
        if not stage.frozen
        and any(outs.get(dep["path"], dep.get("md5")) != dep.get("md5") for dep in lock.get(name, {}).get("deps", []))
    ]


def _find_key(name: str) -> str:
    """Return the key of the newest pipeline run with this key, name or DVC experiment; "" if there is none."""
    for path in sorted(PIPELINE_RUNS.glob(f"*/{JOURNAL_FILE}"), reverse=True):
        begin = _first_record(path)
        tags = begin.get("tags", {})
        if name in (path.parent.name, tags.get(RUN_NAME), tags.get(DVC_EXPERIMENT)) and name:
            return path.parent.name
    return ""


def _of_key(name: str, key: str) -> ComparedRun | None:
    """Read a pipeline run and its stages from their journals; None if this machine has none of them.

    A run that `dvc repro` has started has no journal of its own.
    """
    journal = PIPELINE_RUNS / key / JOURNAL_FILE
    settings: dict[str, str] = dict(_first_record(journal).get("params", {})) if journal.is_file() else {}
    used: dict[str, str] = {}  # by stages: params.yaml may have been edited before they started
    numbers: dict[str, float] = {}
    images: dict[str, bytes] = {}
    for path in (*journal.parent.glob(f"cached/*/{JOURNAL_FILE}"), *Path("runs").glob(f"*/*/tracked/*/{JOURNAL_FILE}")):
        begin = _first_record(path)
        if begin.get("parent") != key:
            continue
        stage = dvc_yaml.cli_name(begin["stage"])
        settings |= begin.get("parent_params", {})
        used |= begin["params"]
        numbers |= {f"{stage}.{metric}": value for metric, value in _journal_numbers(path, stage).items()}
        if stage == "evaluate":
            images |= _journal_images(path)
    settings |= used
    if not settings:
        return None
    values = {setting: _literal(value) for setting, value in settings.items()}
    run = ComparedRun(name, f"pipeline run {key}", _settings(values), numbers)
    _add_pictures(run, lambda picture: images.get(picture, b""), "Its evaluate stage did not run in it.")
    return run


def _journal_numbers(path: Path, stage: str) -> dict[str, float]:
    """Return the numbers of a stage: the JSON file that it has written, or those reported for a cached result."""
    with suppress(OSError, ValueError):
        return flatten_numbers(json.loads((path.parent / OUTPUTS / f"{stage}.json").read_bytes()))
    # Names of curves have a "/", such as "train/mse".
    return {name: curve[max(curve)] for name, curve in read_points(path).items() if "/" not in name}


def _journal_images(path: Path) -> dict[str, bytes]:
    """Return the newest image of each name in a journal, by the name of its file in a report."""
    return {
        f"{record['name']}.png": _read(path.parent / record["file"])
        for record, _ in read_records(path)
        if record["kind"] == "image"
    }


def find_experiment(name: str) -> str:
    """Return the commit of a DVC experiment; "" if there is none."""
    refs = git("for-each-ref", "--sort=-creatordate", "--format=%(objectname) %(refname)", "refs/exps")
    for line in refs.splitlines():
        commit, ref = line.split()
        if ref.count("/") == 4 and ref.rpartition("/")[2] == name:  # refs/exps/ab/cdef.../NAME
            return commit
    return ""


def _add_pictures(run: ComparedRun, read: Callable[[str], bytes], reason: str, command: str = "") -> None:
    damaged = []
    for name in PICTURES:
        png = read(f"{name}.png")
        if png and not _is_intact(png):
            damaged.append(name)
        elif png:
            run.pictures[name] = png
    if damaged:
        run.notes.append(Note(f"Pictures damaged of {run.name}: {', '.join(damaged)}."))
    if missing := [name for name in PICTURES if name not in run.pictures and name not in damaged]:
        run.notes.append(Note(f"{run.name} has no pictures of {' and '.join(missing)}. {reason}", command))


def _is_intact(png: bytes) -> bool:
    """Return whether an image is a PNG that can be decoded."""
    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # SyntaxError: of a broken chunk
        return False
    return True


def _settings(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in flatten(data).items() if not key.startswith("composed_from.")}


def _numbers(files: Mapping[str, bytes]) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for stem, text in files.items():
        with suppress(ValueError):  # damaged, or with merge markers
            numbers |= {f"{stem}.{key}": value for key, value in flatten_numbers(json.loads(text)).items()}
    return numbers


def _literal(text: str) -> Any:
    """Parse a setting of a journal, which is the text of a Python value."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return list(value) if isinstance(value, tuple) else value


def _first_record(path: Path) -> Record:
    return next(read_records(path), ({}, 0))[0]


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""
