"""MLflow's pages, on this machine alone."""

import os
import socket
import sys

from stages.errors import UserError

HOST = "127.0.0.1"
# What MLflow opens, by the scheme of the URI.
STORES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "file", "databricks", "databricks-uc")


def serve(port: int) -> int:
    """Become `mlflow server` over the project's own store."""
    from stages.tracking import tracker

    uri = tracker.store_uri()
    require_store(uri)
    if uri.startswith(("http://", "https://", "databricks")):
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


def require_store(uri: str) -> None:
    """Refuse a URI that names no store of MLflow's."""
    scheme = uri.partition("://")[0].partition("+")[0] if "://" in uri else "file"  # mysql+pymysql
    if scheme not in STORES:
        raise UserError(
            f"MLFLOW_TRACKING_URI begins with {scheme}://, which MLflow cannot open.",
            where=uri.rpartition("@")[2],
            fix=f"Use a URI of one of {', '.join(STORES)}, or unset it: runs are then kept in mlflow.db here.",
            code=2,
        )
