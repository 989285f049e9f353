"""`vqvae2 ui`: MLflow's web interface, reachable from this machine only."""

import os
import socket
import sys

from stages.errors import UserError

HOST = "127.0.0.1"


def serve(port: int) -> int:
    """Replace this process by `mlflow server` on the project's store.

    Raises UserError if MLFLOW_TRACKING_URI is a server or not supported, or if the port cannot be used.
    """
    from stages.tracking.mlflow_store import store_uri
    from stages.tracking.store_check import check_scheme

    uri = store_uri()
    check_scheme(uri)
    if uri.startswith(("http://", "https://", "databricks")):
        raise UserError(
            "MLFLOW_TRACKING_URI is the address of a server, which has its own web interface.",
            where=uri.rpartition("@")[2],
            fix="Open that address in a browser.",
            code=2,
        )
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
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # it would start a dozen processes that stay idle
    print(f"http://{HOST}:{port}  (stop it with Ctrl-C)", flush=True)
    arguments = ["--host", HOST, "--port", str(port), "--workers", "1", "--backend-store-uri", uri]
    os.execv(sys.executable, [sys.executable, "-P", "-m", "mlflow", "server", *arguments])
