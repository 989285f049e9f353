"""DVC, called as a program: what is out of date and why, and bringing it up to date. The one file that knows DVC."""

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline import dvc_yaml, params
from pipeline.process import die_with_parent, handle_signals
from stages.errors import UserError

LOCK = Path("dvc.lock")
PATIENCE_SECONDS = 30.0  # for a stage asked to stop, before it is told to
NEVER = "it has not run yet"
BUSY = "Another vqvae2 or dvc is at work here"
COMMAND = [sys.executable, "-m", "dvc"]

# What DVC cannot work without, by its own words.
REMEDIES = {
    "dvc.lock' ": f"Restore the file: git checkout {LOCK}. Or delete it: what has run is restored from cache.",
    "not a git repository": "Run: git init",
    "not inside of a DVC repository": "Run: dvc init",
}
# What DVC says of a stage, and what it means.
WORDS = {"deleted": "is not here", "not in cache": "is not in the cache"}  # it may never have been
RUNNING = re.compile(r"Running stage '(.+)':")
KEPT = re.compile(r"Stage '(.+)' didn't change, skipping")
RESTORED = re.compile(r"Stage '(.+)' is cached - skipping run, checking out outputs")
NOISE = re.compile(
    r"$|> exec vqvae2 stage |(Generating|Updating) lock file|To (track the changes|enable auto staging)|\s*git add |"
    r"\s*dvc config core.autostage|Use `dvc push`|Data and pipelines are up to date|'.+\.dvc' didn't change"
)


@dataclass
class Outcome:
    """What became of each stage, by its name in DVC."""

    status: int = 0  # of DVC
    ran: list[str] = field(default_factory=list)
    restored: list[str] = field(default_factory=list)  # from DVC's cache of runs
    kept: list[str] = field(default_factory=list)
    stopped: int = 0  # the signal that ended it


def reasons(
    stages: Mapping[str, dvc_yaml.Stage], targets: Sequence[str] = (), *, only: bool = False
) -> dict[str, list[str]]:
    """Say for each stage that is out of date why, in the order of dvc.yaml; stages up to date are left out.

    With targets: they and what they need; with `only`: they.
    """
    direct = _status()
    considered = set(targets) if only else needed(stages, targets) if targets else set(stages)
    lock = _lock()
    now = params.read()
    found: dict[str, list[str]] = {}
    for name, stage in stages.items():
        before = [stages[one] for one in found if _feeds(stages[one], stage)]
        why = list(_direct(direct.get(name, []), name, lock, now, before))
        if before and name in lock:
            *others, last = (one.cli_name for one in before)
            why.append(f"{', '.join(others)} and {last} run before it" if others else f"{last} runs before it")
        if (why or before) and name in considered:
            found[name] = why or [NEVER]
    return found


def needed(stages: Mapping[str, dvc_yaml.Stage], targets: Sequence[str]) -> set[str]:
    """Name the targets and every stage they need."""
    found = set(targets)
    while True:
        more = {name for name, stage in stages.items() if any(_feeds(stage, stages[one]) for one in found)}
        if more <= found:
            return found
        found |= more


def uncached(names: Sequence[str]) -> list[str]:
    """Pick the stages of which DVC's cache lacks what they have made.

    Where the disk of the cache is full, DVC says so, notes the result down, and may end with status 0. What was made is
    then in one place alone, from which DVC removes it before it runs the stage again.
    """
    if not names:
        return []
    changes = _status("--no-updates", *names)

    def lacks(change: Any) -> bool:
        return isinstance(change, dict) and "not in cache" in change.get("changed outs", {}).values()

    return [name for name in names if any(map(lacks, changes.get(name, [])))]


def reproduce(
    targets: Sequence[str],
    *,
    stages: Mapping[str, dvc_yaml.Stage],
    why: Mapping[str, Sequence[str]],
    environment: Mapping[str, str],
    force: bool = False,
    only: bool = False,
    pull: bool = False,
) -> Outcome:
    """Bring stages up to date by `dvc repro`, telling of each; SIGTERM and SIGINT end it in good order."""
    flags = [flag for flag, wanted in (("--force", force), ("--single-item", only), ("--pull", pull)) if wanted]
    process = subprocess.Popen(
        [*COMMAND, "repro", *flags, *targets],
        stdout=subprocess.PIPE,
        text=True,
        env={**environment, "PATH": os.pathsep.join((str(Path(sys.executable).parent), environment.get("PATH", "")))},
        process_group=0,  # a terminal's Ctrl-C comes to us alone, and is passed on once
        preexec_fn=_in_child,
    )
    outcome = Outcome()
    with handle_signals(_Forwarder(process, outcome).stop):
        for line in _lines(process):
            _tell(line, outcome, stages, why)
        outcome.status = process.wait()
    return outcome


def _in_child() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # what a script starts in the background would ignore it for ever
    die_with_parent(signal.SIGTERM)


def _tell(line: str, outcome: Outcome, stages: Mapping[str, dvc_yaml.Stage], why: Mapping[str, Sequence[str]]) -> None:
    if match := RUNNING.match(line):
        outcome.ran.append(match[1])
        because = "; ".join(why.get(match[1], ())) or "asked for"
        text = f"runs: {because}"
    elif match := RESTORED.match(line):
        outcome.restored.append(match[1])
        text = "restored from cache"
    elif match := KEPT.match(line):
        outcome.kept.append(match[1])
        text = "unchanged"
    else:
        if not NOISE.match(line):
            _say(line)
        return
    name = stages[match[1]].cli_name if match[1] in stages else match[1]
    _say(f"{name:<13} {text}")


def _say(line: str) -> None:
    with suppress(OSError):  # a terminal that has gone is no reason to stop
        print(line, flush=True)


def _lines(process: subprocess.Popen[str]) -> Iterator[str]:
    """Yield what a process prints until it ends, even if something it left behind could still print."""
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


class _Forwarder:
    """Pass what asks us to end to DVC's process group as SIGINT, wait, and insist.

    DVC ends in good order on SIGINT only: on SIGTERM it leaves its stage running.
    """

    def __init__(self, process: subprocess.Popen[str], outcome: Outcome):
        self.process, self.outcome = process, outcome

    def stop(self, number: int, frame: object) -> None:
        first = not self.outcome.stopped
        self.outcome.stopped = self.outcome.stopped or number
        if first:
            self._send(signal.SIGINT)
            threading.Thread(target=self._insist, daemon=True).start()
        else:
            self._send(signal.SIGKILL)

    def _insist(self) -> None:
        for next_signal in (signal.SIGTERM, signal.SIGKILL):
            time.sleep(PATIENCE_SECONDS)
            self._send(next_signal)

    def _send(self, number: int) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)


def _status(*arguments: str) -> dict[str, list[Any]]:
    done = subprocess.run([*COMMAND, "status", "--json", *arguments], capture_output=True, text=True, check=False)
    if holders := re.findall(r"\(PID (\d+)\)", done.stderr):
        raise UserError(
            f"{BUSY}: PID {', '.join(dict.fromkeys(holders))}.",
            where=Path.cwd(),
            fix="Wait for it or stop it, then run the same command again.",
            code=3,
        )
    if done.returncode:
        raise UserError(
            f"DVC cannot tell what is out of date: {_complaint(done.stderr)}",
            where=Path.cwd(),
            fix=next((fix for sign, fix in REMEDIES.items() if sign in done.stderr), "Mend what it names."),
        )
    return dict(json.loads(done.stdout or "{}"))


def _complaint(text: str) -> str:
    """Pick from what DVC prints the sentence that says what is wrong; lines of a file it quotes are indented."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith(" ")]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return errors[-1] if errors else " ".join(lines[:2]) or "it says nothing"


def _lock() -> dict[str, Any]:
    return params.read(LOCK).get("stages", {}) if LOCK.is_file() else {}


def _direct(
    changes: Sequence[Any], name: str, lock: Mapping[str, Any], now: Mapping[str, Any], before: Sequence[dvc_yaml.Stage]
) -> Iterator[str]:
    """Word DVC's findings about one stage. What is not here because stages `before` it are to make it, goes unsaid."""
    if name not in lock and changes:
        yield NEVER
        return
    for change in changes:
        if change == "changed command":
            yield "its command changed"
            continue
        for kind, paths in change.items() if isinstance(change, dict) else ():
            for path, what in paths.items():
                if isinstance(what, dict):
                    yield from _settings(what, lock[name].get("params", {}).get(path, {}), now)
                elif kind == "changed outs" or not (what == "deleted" and any(_makes(one, path) for one in before)):
                    yield f"{path} {WORDS.get(what, f'was {what}')}"


def _settings(changed: Mapping[str, str], before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Name the settings that changed, down to the last key, with both values."""
    for key in changed:
        value: Any = now
        for step in key.split("."):
            value = value.get(step) if isinstance(value, dict) else None
        yield from params.changes(params.flat(before.get(key), key), params.flat(value, key))


def _feeds(one: dvc_yaml.Stage, other: dvc_yaml.Stage) -> bool:
    return any(_makes(one, dep) for dep in other.deps)


def _makes(stage: dvc_yaml.Stage, path: str) -> bool:
    return any(out == path or out.startswith(f"{path}/") for out in stage.outs)
