"""Tags of runs: all names, and the functions that compute the values. Names with "mlflow." have a meaning in MLflow.

To add one, add its name here and its value to `code_tags` for every run, `stage_tags` for the runs of stages, or
`pipeline_tags` for the runs of pipelines.
"""

import subprocess
from collections.abc import Mapping
from pathlib import Path

from stages.formats import artifact

KEY = "vqvae2.key"  # identity of a run, by which it is looked up before it is created
MODEL = "vqvae2.model"  # "complete" after the last file of a pipeline run's model has been uploaded
STAGE, FINGERPRINT = "stage", "fingerprint"
CACHED, CACHED_FROM = "cached", "cached.from"  # "yes" or "no"; the id of the run that computed the result
# Followed by the path of an input without parts such as ".."; the value is its digest, and the path if that has such.
INPUT_PREFIX = "input."
ERROR = "error"
COMMAND, DATASET, PRESET = "command", "dataset", "preset"
DVC_EXPERIMENT = "dvc.experiment"
DVC_STAGE, DVC_LOCK = "dvc.stage", "dvc.lock"
GIT_COMMIT, GIT_DIRTY = "git.commit", "git.dirty"
RUN_NAME, PARENT_RUN = "mlflow.runName", "mlflow.parentRunId"
NOTE = "mlflow.note.content"  # description on the page of a run
USER, SOURCE_NAME, SOURCE_COMMIT = "mlflow.user", "mlflow.source.name", "mlflow.source.git.commit"


def pipeline_tags(
    name: str, command: str, *, dataset: str, preset: str = "", experiment: str = "", note: str = ""
) -> dict[str, str]:
    """Return the tags of a pipeline run: its name, the command that started it, and what it computes.

    `experiment` is the name of DVC's experiment, `note` the description on the page of the run. Empty tags are omitted.
    """
    tags = {RUN_NAME: name, COMMAND: command, DATASET: dataset, PRESET: preset, DVC_EXPERIMENT: experiment, NOTE: note}
    return {tag: value for tag, value in tags.items() if value}


def stage_tags(stage: str) -> dict[str, str]:
    """Return the tags of a run of a stage, or of its cached result."""
    return {**code_tags(), **lock_tag(), DVC_STAGE: stage}


def code_tags() -> dict[str, str]:
    """Return tags with the Git commit and whether the code has uncommitted changes."""
    commit = git("rev-parse", "HEAD")
    changes = git("status", "--porcelain", "--untracked-files=no", "--", "*.py", "dvc.yaml")
    tags = {GIT_COMMIT: commit, SOURCE_COMMIT: commit, GIT_DIRTY: "yes" if changes else "no"}
    return {name: value for name, value in tags.items() if value}


def lock_tag() -> dict[str, str]:
    """Return a tag with the digest of dvc.lock: for a stage before it runs, for a pipeline after it has run."""
    lock = Path("dvc.lock")
    return {DVC_LOCK: artifact.sha256(lock)} if lock.is_file() else {}


def creation_tags(key: str, stage: str, user: str) -> dict[str, str]:
    """Return the tags of every run at its creation: of a pipeline, of a stage, and of a cached stage."""
    return {KEY: key, STAGE: stage, USER: user, SOURCE_NAME: "vqvae2"}


def start_tags(stage: str, fingerprint: str, tags: Mapping[str, str], inputs: Mapping[str, str]) -> dict[str, str]:
    """Return the tags of a run that starts: `tags` of its journal, and the digests of its inputs."""
    start = {STAGE: stage, FINGERPRINT: fingerprint, CACHED: "no", **tags}
    return start | dict(_input_tag(name, digest) for name, digest in inputs.items())


def _input_tag(path: str, digest: str) -> tuple[str, str]:
    """Return the tag of an input. MLflow rejects a key that is no normal path, such as input.../../photos."""
    name = "/".join(part for part in path.split("/") if part not in ("", ".", ".."))
    return f"{INPUT_PREFIX}{name or 'source'}", digest if name == path else f"{digest} {path}"


def cached_tags(producer: str, description: str) -> dict[str, str]:
    """Return the tags of a cached stage: the id of the run that computed its result, and a description."""
    return {CACHED: "yes", CACHED_FROM: producer, NOTE: f"Cached: this stage did not run. {description}"}


def key_condition(key: str) -> str:
    """Return the search condition of the run with a key."""
    return f"tags.`{KEY}` = '{key}'"


def stage_condition(stage: str) -> str:
    """Return the search condition of the runs of a stage."""
    return f"tags.{STAGE} = '{stage}'"


def producer_condition(fingerprint: str) -> str:
    """Return the search condition of the finished run that computed a result. A fingerprint includes the stage."""
    return f"tags.{FINGERPRINT} = '{fingerprint}' and tags.{CACHED} = 'no' and attributes.status = 'FINISHED'"


def git(*arguments: str) -> str:
    """Return the output of a Git command, "" if it fails."""
    try:
        return subprocess.run(
            ["git", *arguments], capture_output=True, encoding="utf-8", errors="replace", timeout=5, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
