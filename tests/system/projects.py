"""Copies of the project to run commands in, as a user would, and private namespaces to run them where kills do no harm.

Used by the tests beside it and by benchmarks/chaos.py.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from stages.formats import artifact
from stages.tracking.journal import JOURNAL

ROOT = Path(__file__).parents[2]
SMOKE = ("-S", "experiment=smoke")
PRIVATE = ("RAY_", "MLFLOW_", "VQVAE2_", "DVC_", "AWS_")  # variables of the caller that must not reach a command
TOLD = re.compile(r"^(\w+) +(runs|unchanged|restored from cache)(?:$|: (.*))", re.MULTILINE)


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    status: int
    output: str

    def told(self, state: str) -> set[str]:
        """Name the stages of which it said that they run, are unchanged, or are restored from cache."""
        return {name for name, said, _ in TOLD.findall(self.output) if said == state}


@dataclass(frozen=True)
class Project:
    """A copy of the project with its own Git repository and its own DVC cache."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of_working_tree(cls, folder: Path) -> "Project":
        """Copy what Git would keep of the working tree, as it lies."""
        names = subprocess.check_output(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True
        )
        for name in filter(None, names.split("\0")):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        project = cls(folder)
        project.call("git", "init", "--quiet")
        project.commit()
        return project

    def copy(self, folder: Path, **environment: str) -> "Project":
        """Copy everything: artifacts, cache and working folders, too."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return Project(folder, {**self.environment, **environment})

    def clone(self, folder: Path, **environment: str) -> "Project":
        """Clone what is committed: no artifacts, no cache."""
        subprocess.run(["git", "clone", "--quiet", str(self.folder), str(folder)], check=True)
        return Project(folder, {**self.environment, **environment})

    def commit(self) -> None:
        self.call("git", "add", "--all")
        self.call("git", "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "--quiet", "-m", "State")

    def call(self, *command: str, status: int = 0, timeout: float = 400) -> Done:
        """Run a command here; fail with what it printed if it ends with another status."""
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.variables(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()
            output, _ = process.communicate()
            raise AssertionError(f"{' '.join(command)} took more than {timeout:g} s:\n{output}") from None
        assert process.returncode == status, f"{' '.join(command)} ended with {process.returncode}:\n{output}"
        return Done(process.returncode, output)

    def run(self, *arguments: str, status: int = 0) -> Done:
        """Run `vqvae2 run` with these arguments."""
        return self.call("vqvae2", "run", *arguments, status=status)

    def variables(self) -> dict[str, str]:
        """Name the environment of commands here: this interpreter's programs first, nothing private of the caller's."""
        return _public() | {
            "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
            "COLUMNS": "120",
            "DVC_NO_ANALYTICS": "1",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive",
            "PYTHONFAULTHANDLER": "1",
            "SHELL": "/bin/sh",  # what DVC runs stages with; as in a container, where no SHELL is set
            **self.environment,
        }

    def digests(self, *names: str) -> dict[str, str]:
        """Digest artifacts by their names under artifacts/, or all of them: equal digests are equal bytes."""
        root = self.folder / "artifacts"
        folders = [root / name for name in names] or [path.parent for path in sorted(root.rglob(artifact.MANIFEST))]
        return {str(folder.relative_to(root)): artifact.sha256(folder / artifact.MANIFEST) for folder in folders}

    def newest_step(self, stage: str) -> int:
        """The step of the newest checkpoint of a stage; 0 where there is none."""
        steps = (self.folder / "runs" / stage).glob("*/step-*[0-9]")
        return max((int(path.name.removeprefix("step-")) for path in steps), default=0)

    def reported_step(self, stage: str) -> int:
        """The last step a stage has reported; 0 for one that does not count steps."""

        def steps() -> Iterator[int]:
            for path in (self.folder / "runs" / stage).rglob(JOURNAL):
                for line in path.read_text(encoding="utf-8").splitlines():
                    entry = json.loads(line)
                    if entry["kind"] == "metrics" and any(name.startswith("train/") for name in entry["values"]):
                        yield entry["step"]

        return max(steps(), default=0)


class Namespace:
    """Processes, network and mounts of their own, under a shell: whatever is started here ends with it."""

    def __init__(self) -> None:
        self.shell = subprocess.Popen(
            ["unshare", "--pid", "--net", "--mount", "--fork", "--kill-child", "--mount-proc", "bash"],
            stdin=subprocess.PIPE,
            text=True,
            env=_public(),
        )
        # Job control: without it, what a shell starts in the background ignores Ctrl-C for ever.
        self.say("set -m; ip link set lo up")

    def __enter__(self) -> "Namespace":
        return self

    def __exit__(self, *error: object) -> None:
        self.shell.kill()
        self.shell.wait()

    def start(self, project: Project, *command: str, log: str) -> "Job":
        """Start a command in a project's folder, its output in a file beside the folder."""
        job = Job(self, project.folder.parent / f"{log}.log", project.folder.parent / f"{log}.status")
        job.status_file.unlink(missing_ok=True)
        script = job.log.with_suffix(".sh")
        exports = "".join(f"export {name}={_quoted(value)}\n" for name, value in project.variables().items())
        words = " ".join(map(_quoted, command))
        script.write_text(
            f"{exports}cd {_quoted(str(project.folder))}\n{words}\n"
            f"echo $? > {_quoted(f'{job.status_file}.new')}\nmv {_quoted(f'{job.status_file}.new')} "
            f"{_quoted(str(job.status_file))}\n"
        )
        self.say(f"bash {_quoted(str(script))} > {_quoted(str(job.log))} 2>&1 &")
        return job

    def processes(self) -> list[psutil.Process]:
        """List every process in here but the shells."""
        found = []
        for process in psutil.Process(self.shell.pid).children(recursive=True):
            try:
                if process.name() != "bash" and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def find(self, kind: str) -> list[psutil.Process]:
        """List the processes of one kind: run, dvc, stage, cluster, worker."""
        return [process for process in self.processes() if kind_of(process) == kind]

    def say(self, line: str) -> None:
        """Have the shell run a line."""
        assert self.shell.stdin
        self.shell.stdin.write(f"{line}\n")
        self.shell.stdin.flush()


@dataclass(frozen=True)
class Job:
    """A command started in a namespace."""

    namespace: Namespace
    log: Path
    status_file: Path

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    @property
    def ended(self) -> bool:
        return self.status_file.exists()

    def wait(self, seconds: float = 300) -> Done:
        until(lambda: self.ended, seconds, lambda: f"still running:\n{self.output}")
        return Done(int(self.status_file.read_text()), self.output)

    def send(self, number: signal.Signals, kind: str) -> None:
        """Send a signal to the one process of a kind."""
        (process,) = self.namespace.find(kind)
        process.send_signal(number)


def kind_of(process: psutil.Process) -> str:
    """Say what a process is to us; "" for what is part of Ray or of the system."""
    try:
        words = process.cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""
    line = " ".join(words)
    if words and words[0].startswith("ray::"):
        return "worker" if "_work" in line or "TrainWorker" in line or "MapWorker" in line else ""
    for kind, sign in (("run", "vqvae2 run"), ("stage", "vqvae2 stage"), ("cluster", "-m pipeline.shared_cluster")):
        if sign in line and "python" in words[0]:
            return kind
    return "dvc" if "-m dvc repro" in line else ""


def _public() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(PRIVATE)}


def until(holds: Callable[[], object], seconds: float, otherwise: Callable[[], str] = lambda: "") -> None:
    """Look again and again until something holds; fail when the time is over."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds:g} s; {otherwise()}"
        time.sleep(0.05)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def namespaces_refused() -> str:
    """Say why private namespaces cannot be had here; "" if they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs Linux and root"
    for program in ("unshare", "ip", "bash"):
        if shutil.which(program) is None:
            return f"needs {program}"
    tried = subprocess.run(
        ["unshare", "--pid", "--net", "--mount", "--fork", "--mount-proc", "true"], capture_output=True, check=False
    )
    return "the kernel refuses private namespaces" if tried.returncode else ""


@contextmanager
def timed() -> Iterator[Callable[[], float]]:
    """Yield a clock: the seconds since the block began."""
    start = time.monotonic()
    yield lambda: time.monotonic() - start
