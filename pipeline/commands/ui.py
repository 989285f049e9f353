"""`vqvae2 ui`: MLflow's web interface, reachable from this machine only."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import webbrowser
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path

from pipeline import params
from pipeline.process import die_with_parent, handle_signals
from stages.errors import UserError

HOST = "127.0.0.1"
POLL_INTERVAL_S = 0.2
LOG = Path("runs/mlflow_server.log")  # messages of the server


def serve(port: int, *, browser: bool = True) -> int:
    """Run MLflow's server on the project's store until a signal, and show the pages of the runs.

    If MLFLOW_TRACKING_URI is a server, show its pages and return. `browser` opens a browser if there is a display.
    Raises UserError if the store cannot be used, if the port cannot be used, or if the server fails.
    """
    from stages.tracking.mlflow_store import configure_mlflow, store_uri
    from stages.tracking.store_check import StoreUnavailableError, check_store

    uri = store_uri()
    with suppress(StoreUnavailableError):  # the request for the pages explains it
        check_store()
    if uri.startswith("databricks"):
        raise UserError(
            "MLFLOW_TRACKING_URI is a Databricks workspace, which has its own web interface.",
            where=uri.rpartition("@")[2],
            fix="Open the workspace in a browser.",
            code=2,
        )
    if uri.startswith(("http://", "https://")):
        _show_pages(uri, browser=browser)
        return 0
    _require_port(port)
    stopped = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopped
        stopped = True
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)

    print("Starting MLflow; stop it with Ctrl-C.", flush=True)
    process = _start_server(uri, port)
    with handle_signals(stop):
        configure_mlflow()  # takes seconds, in which the server starts
        if _is_ready(process, f"http://{HOST}:{port}") and not stopped:
            _show_pages(f"http://{HOST}:{port}", browser=browser)
        status = process.wait()
    if not stopped:
        raise UserError(
            f"MLflow's server ended with status {status}: {_last_line(LOG)}",
            where=LOG,
            fix="Correct what its messages name, then run: vqvae2 ui",
            code=3,
        )
    return 0


def _require_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # MLflow's server sets it too
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(
                f"Port {port} cannot be used: {error.strerror}.",
                where=f"{HOST}:{port}",
                fix=f"Choose another port: vqvae2 ui --port {port % 65_535 + 1}",
                code=3,
            ) from None


def _start_server(uri: str, port: int) -> subprocess.Popen[bytes]:
    arguments = ["--host", HOST, "--port", str(port), "--workers", "1"]
    LOG.parent.mkdir(exist_ok=True)
    with LOG.open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "mlflow", "server", *arguments],
            # Every user of a machine sees arguments, and the URI may hold a password. Job execution would start a
            # dozen processes that stay idle.
            env={
                **os.environ,
                "MLFLOW_BACKEND_STORE_URI": uri,
                "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            },
            stdout=log,
            stderr=log,
            process_group=0,  # a terminal sends Ctrl-C to our group only; we end the server and its workers together
            preexec_fn=lambda: die_with_parent(signal.SIGTERM),
        )


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it printed nothing"


def _is_ready(process: subprocess.Popen[bytes], address: str) -> bool:
    """Wait for the first answer of a server; return False if its process ends before."""
    while process.poll() is None:
        with suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=1):
            return True
        time.sleep(POLL_INTERVAL_S)
    return False


def _show_pages(server: str, *, browser: bool) -> None:
    from stages.tracking.pages import run_pages

    levels: Collection[str] = ()
    with suppress(UserError):  # MLflow is shown without valid settings too
        levels = params.load().vqvae.levels
    pages = run_pages(server, levels=levels)
    for label, address in pages.items():
        print(f"{label:<13} {address}", flush=True)
    if browser:
        open_browser(next(iter(pages.values())))


def open_browser(
    address: str,
    *,
    environment: Mapping[str, str] = os.environ,
    is_terminal: bool | None = None,
    open_page: Callable[[str], object] = webbrowser.open,
) -> None:
    """Open a page in a browser, if a person with a display has started the command."""
    is_terminal = sys.stdout.isatty() if is_terminal is None else is_terminal
    has_display = sys.platform == "darwin" or "DISPLAY" in environment or "WAYLAND_DISPLAY" in environment
    if is_terminal and has_display:
        open_page(address)
