"""What the stages of one `vqvae2 run` share: a Ray cluster, started when the first stage asks, and an exit status.

DVC stands between the run and its stages, so they meet at a socket in a private folder.
"""

import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

FOLDER = "VQVAE2_RUN"  # of the socket and the status; unset outside of `vqvae2 run`


class Meeting:
    """The side of the run."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="vqvae2-"))  # mode 0700; short, as a socket's path must be
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(self.folder / "cluster"))
        self._socket.listen()

    def serve(self, cluster: Callable[[], dict[str, str]]) -> None:
        """Answer each stage with the environment of the cluster, until `close`."""
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                connection.sendall(json.dumps(cluster()).encode())

    def status(self) -> int:
        """The exit status of the stage that failed; 0 if none said so."""
        path = self.folder / "status"
        return int(path.read_text()) if path.is_file() else 0

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def cluster_environment() -> dict[str, str]:
    """Ask the run for its cluster, as a stage; nothing where there is no run or the user named a cluster."""
    folder = os.environ.get(FOLDER)
    if not folder or os.environ.get("RAY_ADDRESS"):
        return {}
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(str(Path(folder, "cluster")))
        answer = b""
        while piece := connection.recv(65_536):
            answer += piece
    return dict(json.loads(answer))


def tell(status: int) -> int:
    """Leave a stage's exit status for the run, since DVC passes on its own; return it."""
    folder = os.environ.get(FOLDER)
    if folder and Path(folder).is_dir():
        Path(folder, "status").write_text(str(status))
    return status
