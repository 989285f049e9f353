"""DVC experiments without results: those that run, wait in DVC's queue or have failed."""

import json
import os
from contextlib import suppress
from pathlib import Path

from stages.errors import UserError
from stages.tracking.tags import git

WAITING, FAILED = "stash", "failed"  # refs in refs/exps/celery, whose reflogs list the experiments of DVC's queue
RUN_FILES = Path(".dvc/tmp/exps/run")  # DVC's files of each experiment that runs: REVISION/REVISION.run and others
LAST_RUNNING_STATE = 2  # in a .run file: 0 pending, 1 preparing, 2 running; finished ones have greater numbers
QUEUE = "dvc-task"  # the location in the .run file of an experiment of the queue
WORKSPACE = "workspace"  # that of one in the project's folder itself


def explain(name: str) -> UserError | None:
    """Return the error that explains why an experiment has no results; None if DVC knows no unfinished one."""
    if location := running_location(name):
        what = "is running"
        if location == QUEUE:
            fix = f"Look at its output: dvc queue logs -f {name}"
        else:
            fix = "Look at its progress: vqvae2 status" if location == WORKSPACE else "Wait until it ends."
    elif _is_in(WAITING, name):
        what, fix = "waits in the queue", "Run the experiments of the queue: dvc queue start"
    elif _is_in(FAILED, name):
        what, fix = "failed", f"See why: dvc queue logs {name}"
    else:
        return None
    text = f"{name} is a DVC experiment that {what}, so it has no results."
    return UserError(text, where=Path.cwd(), fix=fix, code=2)


def running_location(name: str) -> str:
    """Return where DVC runs an experiment, as its .run file calls it; "" if it does not run."""
    for path in RUN_FILES.glob("*/*.run"):
        with suppress(OSError, ValueError, TypeError, KeyError):
            facts = json.loads(path.read_text(encoding="utf-8"))
            if facts["name"] == name and facts["status"] <= LAST_RUNNING_STATE and _is_alive(path.with_suffix(".json")):
                return str(facts["location"])
    return ""


def _is_alive(process_file: Path) -> bool:
    """Return whether the process of an experiment of the queue lives. For others there is no file of a process."""
    try:
        facts = json.loads(process_file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return True
    if facts["returncode"] is not None:
        return False
    with suppress(PermissionError):  # of another user
        try:
            os.kill(facts["pid"], 0)
        except ProcessLookupError:
            return False
    return True


def _is_in(queue: str, name: str) -> bool:
    messages = git("log", "--walk-reflogs", "--format=%gs", f"refs/exps/celery/{queue}", "--")
    return name in {message.rpartition(":")[2] for message in messages.splitlines()}  # dvc-exp:REV:BASELINE:NAME
