"""Checks of what a run connects to: Ray, MLflow and the object store. Each is bounded in time."""

import threading
from collections.abc import Callable, Mapping

from pipeline.checks.check import Answer, Request
from stages.errors import UserError
from stages.runtime import ray_address, ray_sessions
from stages.runtime.storage import Storage
from stages.tracking import store_check
from stages.tracking.journal import redact_secrets

STORAGE_TIMEOUT_S = 20.0
MAX_SOCKET_FOLDER = ray_sessions.MAX_SOCKET_PATH - len("/pymp-12345678/listener-12345678")


def check_ray(environment: Mapping[str, str]) -> Answer:
    """Check that the cluster at RAY_ADDRESS answers and requires a token, or that a private one can start."""
    address = environment.get("RAY_ADDRESS", "")
    if not address:
        folder = ray_sessions.sessions_parent(environment)
        return Answer(f"no RAY_ADDRESS: each run starts a private cluster, with its sessions in {folder / 'ray'}")
    ray_address.check_address(address, environment=environment)
    if not ray_address.read_token(environment):
        return Answer(
            f"RAY_ADDRESS={address}, but no token is sent",
            "Start the cluster with RAY_AUTH_MODE=token, and set it here with RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH: "
            "without a token, anyone who reaches its port can run code there.",
        )
    return Answer(f"{address} answers")


def check_mlflow(environment: Mapping[str, str]) -> Answer:
    """Check that MLflow accepts runs. A server that does not answer is a warning: runs continue without it."""
    try:
        return Answer(store_check.check_store(environment))
    except store_check.StoreUnavailableError as error:
        return Answer(f"{error.where}: {error.what}", error.fix)


def check_loader_sockets(request: Request) -> Answer:
    """Check that the sockets of DataLoader processes fit into the temporary folder."""
    folder = request.environment.get("TMPDIR", "")
    loads = any(config.loader_workers for config in request.settings.cluster.variants())
    if loads and len(folder.encode(errors="surrogateescape")) > MAX_SOCKET_FOLDER:
        raise UserError(
            f"TMPDIR must have at most {MAX_SOCKET_FOLDER} bytes for cluster.loader_workers, because it holds sockets.",
            where=f"TMPDIR={folder}",
            fix="Choose a folder with a shorter path, or set cluster.loader_workers to 0.",
            code=2,
        )
    return Answer(folder or "/tmp")


def check_storage(request: Request, timeout_s: float = STORAGE_TIMEOUT_S) -> Answer:
    """Check that the object stores for nodes without a shared disk can be written to."""
    urls = list(dict.fromkeys(filter(None, (config.storage for config in request.settings.cluster.variants()))))
    for url in urls:
        bounded(
            Storage(url).check,
            timeout_s,
            UserError(
                f"The storage does not work: no answer within {timeout_s:g} s.",
                where=f"cluster.storage: {url}",
                fix="Check the URL and the endpoint in the environment, such as AWS_ENDPOINT_URL.",
                code=3,
            ),
        )
    if not urls:
        return Answer("none: all nodes share this folder")
    return Answer(f"{redact_secrets(', '.join(urls))} can be written to")


def bounded(call: Callable[[], object], timeout_s: float, timeout_error: UserError) -> None:
    """Call in a thread, and raise `timeout_error` if that takes longer than `timeout_s`."""
    errors: list[Exception] = []

    def work() -> None:
        try:
            call()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        raise timeout_error
    if errors:
        raise errors[0]
