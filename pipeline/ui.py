"""MLflow's pages, on this machine alone."""

import os
import sys

from stages.errors import UserError


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
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # a dozen idle processes otherwise
    print(f"http://127.0.0.1:{port}  (end it with Ctrl-C)", flush=True)
    arguments = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1", "--backend-store-uri", uri]
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", "server", *arguments])
