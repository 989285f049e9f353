"""Processes of tests, forked from one that has imported what they need: each saves seconds of imports."""

import atexit
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.context import ForkServerContext
from pathlib import Path

# Imported by the fork server once. Each process inherits them as they are after their import.
PRELOADED = (
    *("pytest", "stages.prior", "stages.vqvae", "torch._dynamo"),
    *("pipeline.cli", "pipeline.preflight", "pipeline.presets", "pipeline.stage_runner", "hydra", "rich.console"),
)


def fork_server() -> ForkServerContext:
    """Return the context whose processes come from the fork server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def run_command(
    arguments: Sequence[str], folder: Path, environment: Mapping[str, str], *, timeout_s: float
) -> subprocess.CompletedProcess[str]:
    """Run `vqvae2` in a folder, with exactly this environment. Raises subprocess.TimeoutExpired."""
    with tempfile.TemporaryDirectory() as outputs:
        streams = Path(outputs, "stdout"), Path(outputs, "stderr")
        process = fork_server().Process(target=_run, args=(tuple(arguments), folder, dict(environment), streams))
        process.start()
        process.join(timeout_s)
        if is_late := process.exitcode is None:
            process.kill()
            process.join()
        stdout, stderr = (path.read_text(encoding="utf-8") for path in streams)
        if is_late:
            raise subprocess.TimeoutExpired(arguments, timeout_s, stdout, stderr)
    return subprocess.CompletedProcess(arguments, process.exitcode, stdout, stderr)


def _run(arguments: tuple[str, ...], folder: Path, environment: Mapping[str, str], streams: tuple[Path, Path]) -> None:
    """Become a process that a shell could have started: its folder, environment, arguments, streams and exit."""
    from pipeline.cli import main

    for number, path in enumerate(streams, start=1):
        with path.open("wb") as file:
            os.dup2(file.fileno(), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["vqvae2", *arguments]
    sys.orig_argv = [sys.executable, "-c", "from pipeline.cli import main; main()", *arguments]
    try:
        main()
    finally:
        with suppress(OSError):
            sys.stdout.flush()
        atexit._run_exitfuncs()  # processes of multiprocessing end without them
