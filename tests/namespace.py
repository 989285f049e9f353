"""Linux namespaces in which tests and benchmarks kill processes without harm to others."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.command_line_project import CommandLineProject, CommandResult, public_environment

POLL_INTERVAL_S = 0.05


class Namespace:
    """Shell with its own processes, network and mounts. Every process started in it ends with it."""

    def __init__(self) -> None:
        self.shell = subprocess.Popen(
            ["unshare", "--pid", "--net", "--mount", "--fork", "--kill-child", "--mount-proc", "bash"],
            stdin=subprocess.PIPE,
            text=True,
            env=public_environment(),
        )
        # Job control: without it, processes that a shell starts in the background ignore Ctrl-C.
        self.shell_line("set -m; ip link set lo up")

    def __enter__(self) -> "Namespace":
        return self

    def __exit__(self, *error: object) -> None:
        self.shell.kill()
        self.shell.wait()

    def start(self, project: CommandLineProject, *command: str, log: str) -> "Job":
        """Start a command in a project's folder; write its output to a file beside the folder."""
        job = Job(self, project.folder.parent / f"{log}.log", project.folder.parent / f"{log}.status")
        job.status_file.unlink(missing_ok=True)
        script = job.log.with_suffix(".sh")
        exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in project.variables().items())
        temporary = shlex.quote(f"{job.status_file}.new")
        script.write_text(
            f"{exports}cd {shlex.quote(str(project.folder))}\n{shlex.join(command)}\n"
            f"echo $? > {temporary}\nmv {temporary} {shlex.quote(str(job.status_file))}\n"
        )
        self.shell_line(f"bash {shlex.quote(str(script))} > {shlex.quote(str(job.log))} 2>&1 &")
        return job

    def processes(self) -> list[psutil.Process]:
        """List every process in the namespace except shells."""
        processes = []
        for process in psutil.Process(self.shell.pid).children(recursive=True):
            try:
                if process.name() != "bash" and process.status() != psutil.STATUS_ZOMBIE:
                    processes.append(process)
            except psutil.NoSuchProcess:
                continue
        return processes

    def find(self, role: str) -> list[psutil.Process]:
        """List the processes of one role: run, dvc, stage, cluster or worker."""
        return [process for process in self.processes() if process_role(process) == role]

    def shell_line(self, line: str) -> None:
        """Run a line in the shell."""
        assert self.shell.stdin
        self.shell.stdin.write(f"{line}\n")
        self.shell.stdin.flush()


@dataclass(frozen=True)
class Job:
    """Command started in a namespace."""

    namespace: Namespace
    log: Path
    status_file: Path

    @property
    def output(self) -> str:
        """Output up to now."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    @property
    def ended(self) -> bool:
        """True after the command has ended."""
        return self.status_file.exists()

    def wait(self, timeout_s: float = 300) -> CommandResult:
        """Wait for the command to end. Fail with its output after the timeout."""
        wait_until(lambda: self.ended, timeout_s, lambda: f"still running:\n{self.output}")
        return CommandResult(int(self.status_file.read_text()), self.output)

    def send(self, number: signal.Signals, role: str) -> None:
        """Send a signal to the one process of a role."""
        (process,) = self.namespace.find(role)
        process.send_signal(number)


def process_role(process: psutil.Process) -> str:
    """Return the role of a process: run, dvc, stage, cluster or worker; "" for processes of Ray or the system."""
    try:
        words = process.cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""
    line = " ".join(words)
    if words and words[0].startswith("ray::"):
        return "worker" if "worker_main" in line or "TrainWorker" in line or "MapWorker" in line else ""
    for role, command in (("run", "vqvae2 run"), ("stage", "vqvae2 stage"), ("cluster", "-m pipeline.shared_cluster")):
        if command in line and "python" in words[0]:
            return role
    return "dvc" if "-m dvc repro" in line else ""


def wait_until(condition: Callable[[], object], timeout_s: float, describe: Callable[[], str] = lambda: "") -> None:
    """Poll a condition until it is true. Fail with a description of the state after the timeout."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"not within {timeout_s:g} s; {describe()}"
        time.sleep(POLL_INTERVAL_S)


def missing_namespace_support() -> str:
    """Return the reason why namespaces are not available; "" if they are."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs Linux and root"
    for program in ("unshare", "ip", "bash"):
        if shutil.which(program) is None:
            return f"needs {program}"
    unshare = subprocess.run(
        ["unshare", "--pid", "--net", "--mount", "--fork", "--mount-proc", "true"], capture_output=True, check=False
    )
    return "the kernel does not allow private namespaces" if unshare.returncode else ""
