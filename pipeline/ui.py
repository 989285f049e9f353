"""MLflow's pages, on this machine alone."""

import os
import socket
import sys

from stages.errors import UserError

HOST = "127.0.0.1"


def serve(port: int) -> int:
    """Become `mlflow server` over the project's own store."""
    from stages.runtime import tracking

    uri = tracking.store_uri()
    if uri.startswith(("http://", "https://")):
        raise UserError(
            "MLFLOW_TRACKING_URI names a server, which has pages of its own.",
            where=uri.rpartition("@")[2],
            fix="Open that address in a browser.",
            code=2,
        )
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(
                f"Port {port} cannot be used: {error.strerror}.",
                where=f"{HOST}:{port}",
                fix=f"Open what runs there already, or choose another port: vqvae2 ui --port {port % 65_535 + 1}",
                code=3,
            ) from None
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # a dozen idle processes otherwise
    print(f"http://{HOST}:{port}  (end it with Ctrl-C)", flush=True)
    arguments = ["--host", HOST, "--port", str(port), "--workers", "1", "--backend-store-uri", uri]
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", "server", *arguments])
