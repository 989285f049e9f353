"""What the stages of one `vqvae2 run` share: a Ray cluster, started when the first stage asks, and an exit status.

DVC stands between the run and its stages, so they meet at a socket in a private folder. The cluster belongs to a
process of its own, because Ray takes over the signals of the process that starts it:

    vqvae2 run ── dvc repro ── vqvae2 stage X      asks at the socket
         └─────── python -m pipeline.shared_cluster        holds the cluster until its standard input ends
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

FOLDER = "VQVAE2_RUN"  # of the socket and the status; unset outside of `vqvae2 run`
PATIENCE_SECONDS = 10.0  # for a cluster to end


class SharedCluster:
    """The side of the run: answers stages from its own thread until it is closed."""

    def __init__(self) -> None:
        # Private, of mode 0700. A socket's path must be short, which TMPDIR need not be.
        self.folder = Path(tempfile.mkdtemp(prefix="vqvae2-", dir=None if len(tempfile.gettempdir()) < 80 else "/tmp"))
        self._holder: subprocess.Popen[str] | None = None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(self.folder / "cluster"))
        self._socket.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def __enter__(self) -> "SharedCluster":
        return self

    def __exit__(self, *error: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        if self._holder:
            assert self._holder.stdin
            self._holder.stdin.close()
            try:
                self._holder.wait(PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                self._holder.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def status(self) -> int:
        """The exit status of the stage that failed; 0 if none said so."""
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
                answer = answer or self._start().encode()
                with suppress(ConnectionError):  # the stage was stopped while it waited
                    connection.sendall(answer)

    def _start(self) -> str:
        self._holder = subprocess.Popen(
            [sys.executable, "-m", "pipeline.shared_cluster"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            process_group=0,  # a terminal's Ctrl-C is for the run, which ends its cluster last
        )
        assert self._holder.stdout
        return self._holder.stdout.readline()


def serve_cluster(source: IO[str], sink: IO[str]) -> None:
    """Keep a cluster of the size in params.yaml, told to `sink` as environment variables, until `source` ends."""
    from pipeline import params
    from stages.runtime.cluster import local_cluster

    with local_cluster(params.load().cluster) as environment:
        print(json.dumps(environment), file=sink, flush=True)
        source.read()


def cluster_environment() -> dict[str, str]:
    """Ask the run for its cluster, as a stage; nothing where there is no run, or the user named a cluster."""
    folder = os.environ.get(FOLDER)
    if not folder or os.environ.get("RAY_ADDRESS"):
        return {}
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(str(Path(folder, "cluster")))
        answer = b""
        while piece := connection.recv(65_536):
            answer += piece
    return dict(json.loads(answer or "{}"))  # nothing: it did not start; the stage will meet the reason itself


def record_exit_status(status: int) -> int:
    """Leave a stage's exit status for the run, since DVC has one of its own; return it."""
    folder = os.environ.get(FOLDER)
    if folder and Path(folder).is_dir():
        Path(folder, "status").write_text(str(status))
    return status


if __name__ == "__main__":
    serve_cluster(sys.stdin, sys.stdout)
