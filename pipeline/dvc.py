"""DVC, called as a program: why stages are out of date, and bringing them up to date.

Only this module and dvc_remote.py run DVC.
"""

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline import dvc_yaml, params
from pipeline.locks import BUSY, RETRY_LATER, UNKNOWN_OWNER
from pipeline.out_of_date import NEVER_RUN, NOT_RECORDED, PATH_STATES, describe_changes, describe_version
from pipeline.process import die_with_parent, handle_signals
from pipeline.text import first_few, format_row
from stages.errors import UserError

STOP_TIMEOUT_S = 30.0  # between SIGINT, SIGTERM and SIGKILL to a stage; a stage itself stops within 18 s
MAX_REASONS = 3  # of a stage, in one line
COMMAND = [sys.executable, "-P", "-m", "dvc"]  # -P: no module of the current folder is imported
LOCK_FILE = Path(".dvc/tmp/lock")

# Fixes of DVC's fatal errors, by a part of their text.
FIXES = {
    "dvc.lock' ": dvc_yaml.restore_lock(),
    "not a git repository": "Run: git init. Or, to work without Git: dvc config --local core.no_scm true",
    "not inside of a DVC repository": "Run: dvc init. Or, to work without Git: dvc init --no-scm",
}
REPOSITORY_ERRORS = tuple(FIXES)[1:]
MISSING_STATES = tuple(PATH_STATES.values())
# Lines that `dvc repro` prints.
RUNNING_LINE = re.compile(r"Running stage '(.+)':")
UNCHANGED_LINE = re.compile(r"Stage '(.+)' didn't change, skipping")
RESTORED_LINE = re.compile(r"Stage '(.+)' is cached - skipping run, checking out outputs")
HIDDEN_LINES = re.compile(
    "|".join(
        (
            "$",
            "> exec vqvae2 (stage|versions) ",
            f"Running stage '{dvc_yaml.VERSIONS_STAGE}'",
            "(Generating|Updating) lock file",
            "To (track the changes|enable auto staging)",
            r"\s*git add ",
            r"\s*dvc config core.autostage",
            "Use `dvc push`",
            "Data and pipelines are up to date",
            r"'.+\.dvc' didn't change",
        )
    )
)


@dataclass
class Outcome:
    """Result of `dvc repro`: its exit status, and the stages by what happened to them, under their names in DVC."""

    status: int = 0
    ran: list[str] = field(default_factory=list)
    restored: list[str] = field(default_factory=list)  # from DVC's run cache
    unchanged: list[str] = field(default_factory=list)
    current: str = ""  # the stage that runs now
    stop_signal: int = 0  # the first signal that ended it; 0 for none

    @property
    def visited(self) -> list[str]:
        """Stages that DVC has come to."""
        return [*self.ran, *self.restored, *self.unchanged]


def out_of_date_reasons(
    stages: Mapping[str, dvc_yaml.Stage],
    versions: Mapping[str, str],
    targets: Sequence[str] = (),
    *,
    only: bool = False,
) -> dict[str, list[str]]:
    """Return the reasons of each stage that is out of date, in the order of dvc.yaml.

    `versions` are the result versions by command-line name: their file in the project may be of another revision. With
    targets, only they and their dependencies are listed; with `only`, only the targets. Raises UserError if DVC
    cannot compute its status.
    """
    status = _status()
    considered = set(targets) if only else with_dependencies(stages, targets) if targets else set(stages)
    lock = dvc_yaml.read_lock()
    settings = params.read()
    reasons: dict[str, list[str]] = {}
    for name, stage in stages.items():
        earlier = [stages[other] for other in reasons if stage.depends_on(stages[other])]
        own_reasons = list(describe_changes(status.get(name, []), name, lock, settings, earlier))
        if stage.frozen:  # DVC records what is there, and does not run it
            earlier = []
            own_reasons = [NOT_RECORDED if reason == NEVER_RUN else reason for reason in own_reasons]
        elif name in lock and (changed := describe_version(stage, lock[name], versions)):
            own_reasons.append(changed)
        if earlier and name in lock:
            *names, last = (other.cli_name for other in earlier)
            own_reasons.append(f"{', '.join(names)} and {last} run before it" if names else f"{last} runs before it")
        if (own_reasons or earlier) and name in considered:
            reasons[name] = own_reasons or [NEVER_RUN]
    return reasons


def summarize(reasons: Sequence[str]) -> str:
    """Join the first reasons, and count the others."""
    return first_few(reasons, MAX_REASONS, "; ")


def with_dependencies(stages: Mapping[str, dvc_yaml.Stage], targets: Sequence[str]) -> set[str]:
    """Return the targets and all stages that they depend on."""
    names = set(targets)
    while True:
        dependencies = {
            name for name, stage in stages.items() if any(stages[other].depends_on(stage) for other in names)
        }
        if dependencies <= names:
            return names
        names |= dependencies


def require_status() -> None:
    """Raise UserError if DVC cannot compute its status, as before a run."""
    _status()


def missing_from_cache(names: Sequence[str]) -> list[str]:
    """Return the stages whose outputs are not in DVC's cache.

    If the disk of the cache is full, DVC prints an error, records the result in dvc.lock, and may end with status 0.
    The only copy is then in artifacts/, which DVC deletes before the stage runs again.
    """
    if not names:
        return []
    status = _status("--no-updates", *names)

    def is_missing(change: Any) -> bool:
        return isinstance(change, dict) and "not in cache" in change.get("changed outs", {}).values()

    return [name for name in names if any(map(is_missing, status.get(name, [])))]


def cache_folder() -> Path | None:
    """Return the folder of DVC's cache; None outside of a DVC repository."""
    result = subprocess.run([*COMMAND, "cache", "dir"], capture_output=True, text=True, check=False)
    return None if result.returncode else Path(result.stdout.strip())


def run_repro(
    targets: Sequence[str],
    *,
    reasons: Mapping[str, Sequence[str]],
    environment: Mapping[str, str],
    on_change: Callable[["Outcome"], None] = lambda outcome: None,
    force: bool = False,
    only: bool = False,
    pull: bool = False,
) -> Outcome:
    """Run `dvc repro` and print one line per stage. SIGTERM, SIGINT and SIGHUP stop it gracefully.

    `on_change` is called with the outcome so far when a stage starts, is restored or is unchanged.
    """
    options = {"--force": force, "--single-item": only, "--pull": pull}
    arguments = ["repro", *(option for option, enabled in options.items() if enabled), *targets]
    return _run(arguments, reasons, environment, on_change)


def run_experiment(
    name: str, overrides: Sequence[str], targets: Sequence[str], environment: Mapping[str, str]
) -> Outcome:
    """Run `dvc exp run` in a temporary copy of the project and print one line per stage. Signals as in `run_repro`."""
    chosen = [argument for override in overrides for argument in ("-S", override)]
    return _run(["exp", "run", "--temp", "--name", name, *chosen, *targets], {}, environment, lambda outcome: None)


def _run(
    arguments: Sequence[str],
    reasons: Mapping[str, Sequence[str]],
    environment: Mapping[str, str],
    on_change: Callable[["Outcome"], None],
) -> Outcome:
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**environment, "PATH": os.pathsep.join((str(Path(sys.executable).parent), environment.get("PATH", "")))},
        process_group=0,  # a terminal sends Ctrl-C to our group only; we forward it once
        preexec_fn=_prepare_child,
    )
    outcome = Outcome()
    with handle_signals(_SignalForwarder(process, outcome).stop):
        for line in _read_lines(process):
            if _report_line(line, outcome, reasons):
                on_change(outcome)
        outcome.status = process.wait()
    return outcome


def _prepare_child() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell script starts background jobs with SIGINT ignored
    die_with_parent(signal.SIGTERM)


def _report_line(line: str, outcome: Outcome, reasons: Mapping[str, Sequence[str]]) -> bool:
    """Record and print one line of `dvc repro` in terms of the command line; return whether the outcome changed."""
    if HIDDEN_LINES.match(line):
        return False
    current = ""
    if match := RUNNING_LINE.match(line):
        current = match[1]
        outcome.ran.append(current)
        text = f"runs: {summarize(reasons.get(current, ())) or 'requested'}"
    elif match := RESTORED_LINE.match(line):
        outcome.restored.append(match[1])
        text = "restored from cache"
    elif match := UNCHANGED_LINE.match(line):
        outcome.unchanged.append(match[1])
        text = "unchanged"
    else:
        _print(line)
        return False
    outcome.current = current
    _print(format_row(dvc_yaml.cli_name(match[1]), text))
    return True


def _print(line: str) -> None:
    with suppress(OSError):  # the run continues after its terminal has closed
        print(line, flush=True)


def _read_lines(process: subprocess.Popen[str]) -> Iterator[str]:
    """Yield a process's output until it ends. Orphaned children that keep the pipe open are not waited for."""
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line.rstrip("\n"))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    while reader.is_alive() or not lines.empty():
        try:
            yield lines.get(timeout=0.1)
        except queue.Empty:
            if process.poll() is not None:
                return


class _SignalForwarder:
    """Signal handler that stops DVC's process group: SIGINT first, SIGTERM and SIGKILL after a timeout each.

    DVC stops gracefully on SIGINT only; on SIGTERM it ends and leaves its stage running. A second signal from the user
    kills the group at once.
    """

    def __init__(self, process: subprocess.Popen[str], outcome: Outcome):
        self.process, self.outcome = process, outcome

    def stop(self, number: int, frame: object) -> None:
        if self.outcome.stop_signal:
            self._send(signal.SIGKILL)
            return
        self.outcome.stop_signal = number
        self._send(signal.SIGINT)
        threading.Thread(target=self._escalate, daemon=True).start()

    def _escalate(self) -> None:
        for next_signal in (signal.SIGTERM, signal.SIGKILL):
            time.sleep(STOP_TIMEOUT_S)
            self._send(next_signal)

    def _send(self, number: int) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)


def _status(*arguments: str) -> dict[str, list[Any]]:
    result = subprocess.run([*COMMAND, "status", "--json", *arguments], capture_output=True, text=True, check=False)
    return parse_status(result)


def parse_status(result: subprocess.CompletedProcess[str]) -> dict[str, list[Any]]:
    """Parse the output of `dvc status --json`: changes by stage.

    Raises UserError if another process holds DVC's lock, or if DVC failed.
    """
    if holders := re.findall(r"\(PID (\d+)\)", result.stderr):
        raise UserError(f"{BUSY}: PID {', '.join(dict.fromkeys(holders))}.", where=Path.cwd(), fix=RETRY_LATER, code=3)
    if "Unable to acquire lock" in result.stderr:
        raise UserError(f"{BUSY}: {_lock_owner()}.", where=LOCK_FILE.absolute(), fix=RETRY_LATER, code=3)
    if result.returncode:
        raise UserError(
            f"DVC cannot compute its status: {error_message(result.stderr)}",
            where=Path.cwd(),
            fix=next((fix for text, fix in FIXES.items() if text in result.stderr), "Fix what the message names."),
            code=3 if any(text in result.stderr for text in REPOSITORY_ERRORS) else 1,
        )
    return dict(json.loads(result.stdout or "{}"))


def _lock_owner() -> str:
    """Return the PID that DVC has written into its lock."""
    with suppress(OSError):
        if pid := LOCK_FILE.read_text(encoding="utf-8", errors="replace").strip():
            return f"PID {pid}"
    return UNKNOWN_OWNER


def error_message(text: str) -> str:
    """Extract the last error from DVC's output. Lines quoted from a file are indented."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith(" ")]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return errors[-1] if errors else " ".join(lines[:2]) or "it printed no message"
