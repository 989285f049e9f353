"""Ray cluster shared by the stages of one `vqvae2 run`, and the exit status that a failed stage passes to the run.

DVC starts the stages, so a run and its stages communicate through a Unix socket and a file in a private folder. The
cluster starts with the first request, in a separate process, because Ray replaces the signal handlers of the process
that starts it:

    vqvae2 run ── dvc repro ── vqvae2 stage X           requests the cluster's address at the socket
         └─────── python -m pipeline.shared_cluster     serves the cluster until its standard input closes
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO

from stages.errors import UserError

FOLDER = "VQVAE2_RUN"  # environment variable: the private folder; unset outside of `vqvae2 run`
START_MESSAGE_AFTER_S, START_TIMEOUT_S = 20.0, 240.0  # for the cluster; Ray itself takes 4 s on an idle machine
SHUTDOWN_TIMEOUT_S = 10.0  # for the cluster, before it is killed
MAX_TEMPDIR_LENGTH = 80  # in bytes; a socket's path has at most 107 on Linux


class SharedCluster:
    """The run's side: a thread that answers requests of stages until it is closed."""

    def __init__(self) -> None:
        short = len(os.fsencode(tempfile.gettempdir())) < MAX_TEMPDIR_LENGTH
        self.folder = Path(tempfile.mkdtemp(prefix="vqvae2-", dir=None if short else "/tmp"))  # mode 0700
        self._server: subprocess.Popen[str] | None = None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(self.folder / "cluster"))
        self._socket.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def __enter__(self) -> "SharedCluster":
        return self

    def stop(self) -> None:
        """End the cluster without waiting for that; no stage runs any more."""
        if self._server:
            assert self._server.stdin
            self._server.stdin.close()

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):  # macOS: a listening socket is not connected
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self.stop()
        if self._server:
            try:
                self._server.wait(SHUTDOWN_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._server.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def exit_status(self) -> int:
        """Return the exit status of the failed stage; 0 if no stage recorded one."""
        path = self.folder / "status"
        return int(path.read_text()) if path.is_file() else 0

    def _serve(self) -> None:
        answer = b""
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                answer = answer or self._start_server().encode()
                with suppress(ConnectionError):  # the stage was stopped while it waited for the cluster
                    connection.sendall(answer)

    def _start_server(self) -> str:
        self._server = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            process_group=0,  # a terminal sends Ctrl-C to the run only, which closes the cluster last
        )
        assert self._server.stdout
        return self._server.stdout.readline()


def serve_cluster(source: IO[str], sink: IO[str]) -> None:
    """Run a cluster of the size in params.yaml until `source` closes.

    Writes the environment variables of its clients to `sink` as one line of JSON.
    """
    from pipeline import params
    from stages.runtime.cluster import local_cluster

    with local_cluster(params.load().cluster) as environment:
        print(json.dumps(environment), file=sink, flush=True)
        source.read()


def cluster_environment(
    *, message_after_s: float = START_MESSAGE_AFTER_S, timeout_s: float = START_TIMEOUT_S
) -> dict[str, str]:
    """Request the environment variables of the run's cluster, as a stage. Print a message if it starts slowly.

    Returns an empty dictionary outside of a run, if RAY_ADDRESS names a cluster, and if the run's cluster failed to
    start: the stage then starts one itself and reports why. Raises UserError if it does not start in time.
    """
    folder = os.environ.get(FOLDER)
    if not folder or os.environ.get("RAY_ADDRESS"):
        return {}
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(str(Path(folder, "cluster")))
        connection.settimeout(message_after_s)
        try:
            first = connection.recv(65_536)
        except TimeoutError:
            print(f"waiting for the Ray cluster to start, for at most {timeout_s:g} s", file=sys.stderr)
            first = _receive(connection, timeout_s - message_after_s)
        answer = first
        while first and (chunk := _receive(connection, timeout_s)):
            answer += chunk
    return dict(json.loads(answer or "{}"))


def _receive(connection: socket.socket, timeout_s: float) -> bytes:
    connection.settimeout(timeout_s)
    try:
        return connection.recv(65_536)
    except TimeoutError:
        raise UserError(
            "The Ray cluster of this run has not started in time.",
            where="/tmp/ray/session_latest/logs",
            fix="Close other programs, then run the same command again.",
            code=3,
        ) from None


def record_exit_status(status: int) -> int:
    """Write a stage's exit status for the run, because DVC replaces it with its own; return it."""
    folder = os.environ.get(FOLDER)
    if folder and Path(folder).is_dir():
        Path(folder, "status").write_text(str(status))
    return status


if __name__ == "__main__":
    serve_cluster(sys.stdin, sys.stdout)
