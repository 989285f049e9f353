"""Ray cluster of a stage: the cluster at RAY_ADDRESS, or a private one on this machine.

A pipeline run starts one private cluster for all its stages, because each start costs seconds. The stages find it by
RAY_ADDRESS. A private cluster requires a token and listens on loopback only.
"""

import logging
import os
import random
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from stages.cluster_config import ClusterConfig
from stages.errors import UserError
from stages.runtime.capacity import check_resources, private_cluster_cpus, private_cluster_workers, worker_capacity
from stages.runtime.ray_address import check_address
from stages.runtime.ray_sessions import sessions_parent

RAY_OBJECT_STORE_BYTES = 500 * 2**20  # enough for batches in flight; Ray's default is 30% of the memory
PRIVATE_CLUSTER_VARIABLE = "VQVAE2_PRIVATE_CLUSTER"  # set together with RAY_ADDRESS for a cluster started here
PACKAGE_ROOT = Path(__file__).parents[2]  # folder of pipeline/, stages/ and models/
CODE = ("stages", "models")  # packages that workers import
# In the wheel these are below one package, next to what workers do not need (pipeline/wheel.py).
IS_WHEEL = not __name__.startswith(CODE)
LOOPBACK_ADDRESS = "127.0.0.1"
START_TIMEOUT_S = 180  # of the processes of a private cluster; Ray itself waits for 30 s
AGENT_PORTS = range(20_000, 32_768)  # below those that systems give to connections
RESTART_FIX = "Run the same command again; it starts another cluster."
OTHER_NODES_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # "0": Ray listens on loopback only, on every system
if not os.environ.get("RAY_ADDRESS"):
    # Ray reads these variables when it is first imported, which happens before a cluster starts.
    os.environ.setdefault(OTHER_NODES_VARIABLE, "0")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

# Prefixes of the environment variables that workers on other nodes need as well.
STORAGE_VARIABLE_PREFIXES = ("AWS_", "AZURE_", "FSSPEC_", "GOOGLE_")
FORWARDED_PREFIXES = (
    *STORAGE_VARIABLE_PREFIXES,
    "GLOO_",
    "MALLOC_",
    "MLFLOW_",
    "NCCL_",
    "OMP_",
    "RAY_TRAIN_",
    "VQVAE2_FAULT",
)


@contextmanager
def local_cluster(config: ClusterConfig) -> Iterator[dict[str, str]]:
    """Start a private cluster for the length of the block.

    Yields the environment variables with which other processes join it.
    """
    with _private_cluster(config) as address:
        settings = ("RAY_AUTH_", OTHER_NODES_VARIABLE)
        yield {
            "RAY_ADDRESS": address,
            **{name: value for name, value in os.environ.items() if name.startswith(settings)},
            PRIVATE_CLUSTER_VARIABLE: "1",
        }


@contextmanager
def connect_cluster(config: ClusterConfig) -> Iterator[None]:
    """Connect to the cluster at RAY_ADDRESS, or start a private one, for the length of the block.

    Raises UserError if the cluster cannot be reached, has another version of Ray or Python, or is too small.
    """
    import ray

    if ray.is_initialized():
        check_resources(config)
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        with _private_cluster(config):
            check_resources(config)
            yield
        return
    runtime_env = {}
    private = is_private()
    try:
        # The token of a private cluster is inherited; asking with it takes half a second.
        address = check_address(address, ask_with_token=(lambda *_: "") if private else None)
    except UserError as error:
        error.fix = RESTART_FIX if private else error.fix
        raise
    if not private:
        # Other machines have neither this code nor this environment.
        runtime_env = {
            "py_modules": [str(PACKAGE_ROOT)] if IS_WHEEL else [str(PACKAGE_ROOT / package) for package in CODE],
            "excludes": ["__pycache__", *(["/pipeline", "/conf", "/data", "/.dvc"] if IS_WHEEL else [])],
            "env_vars": {name: value for name, value in os.environ.items() if name.startswith(FORWARDED_PREFIXES)},
            "worker_process_setup_hook": f"{__name__}.{set_gloo_interface.__name__}",
        }
    try:
        _init_ray(address=address, runtime_env=runtime_env)
    except Exception as error:  # Ray raises many types, with texts that are not meant for users
        raise connection_error(error, address, private) from error
    try:
        check_resources(config)
        yield
    finally:
        ray.shutdown()


def connection_error(error: Exception, address: str, is_private: bool) -> UserError:
    """Create the error for a cluster that cannot be joined, from the error that Ray raised."""
    if str(error).startswith("Version mismatch"):
        return UserError(
            " ".join(str(error).split()).rstrip(".") + ".",
            where=f"RAY_ADDRESS={address}",
            fix="Install the cluster's versions of Ray and Python here, or this machine's versions there.",
            code=3,
        )
    return UserError(
        f"The Ray cluster does not answer: {str(error).splitlines()[0]}",
        where=f"RAY_ADDRESS={address}",
        fix=RESTART_FIX
        if is_private
        else "Check the address and the token (RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH), or unset RAY_ADDRESS "
        "to run on this machine.",
        code=3,
    )


def slow_start_error(error: Exception, folder: Path) -> UserError | None:
    """Return the error for a private cluster that has not started in time; None if Ray's error is another one."""
    if "timed out during startup" not in str(error):
        return None
    return UserError(
        "Ray did not start in time on this machine, which may be busy.",
        where=folder / "session_latest" / "logs",
        fix="Close other programs, or wait for them, then run the same command again.",
        code=3,
    )


def set_gloo_interface() -> None:
    """Set GLOO_SOCKET_IFNAME to the network interface that leads to the other nodes, in a worker that just started.

    By default gloo uses the address of the host's name, which is loopback on many systems. A value that the user has
    set stays.
    """
    import ray.util

    _set_gloo_interface(ray.util.get_node_ip_address(), os.environ)


def _set_gloo_interface(node_address: str, environment: MutableMapping[str, str]) -> None:
    import psutil

    for interface, addresses in psutil.net_if_addrs().items():
        if node_address in (address.address for address in addresses):
            environment.setdefault("GLOO_SOCKET_IFNAME", interface)


@contextmanager
def _private_cluster(config: ClusterConfig) -> Iterator[str]:
    """Start a cluster on this machine for the length of the block; yield its address."""
    import ray

    if os.environ.get(OTHER_NODES_VARIABLE) == "0":
        _set_gloo_interface(LOOPBACK_ADDRESS, os.environ)
    folder = sessions_parent() / "ray"
    try:
        ports = free_ports(4)
        with _ray_params(ports[:3]), _patient_start():
            _init_ray(
                address="local",
                num_cpus=private_cluster_cpus(config),
                include_dashboard=False,
                object_store_memory=RAY_OBJECT_STORE_BYTES,
                _temp_dir=str(folder),
                _metrics_export_port=ports[3],
                _system_config={"agent_register_timeout_ms": START_TIMEOUT_S * 1000},
            )
    except Exception as error:  # Ray raises this type itself
        raise slow_start_error(error, folder) or error from None
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()


@contextmanager
def _ray_params(agent_ports: Sequence[int]) -> Iterator[None]:
    """Change parameters of the cluster that `ray.init` starts in the block, for which it has no arguments.

    The log monitor and the autoscaler's monitor do not start: processes that poll for as long as the cluster lives. One
    forwards output of workers, which is kept off the terminal; the other asks for machines, of which a private cluster
    has one. The ports of Ray's agents are chosen here: otherwise a node waits 15 seconds for the agents to report
    theirs, and ends. Python may need longer to start on a busy machine. One of the ports a node reads from a file only.
    """
    import ray

    raylet: Any = ray._raylet
    parameter: Any = ray._private.parameter
    node_type: Any = ray._private.node.Node
    original, start_node = parameter.RayParams, node_type.start_raylet
    metrics_port, dashboard_port, environment_port = agent_ports
    parameter.RayParams = partial(
        original,
        include_log_monitor=False,
        no_monitor=True,
        metrics_agent_port=metrics_port,
        dashboard_agent_listen_port=dashboard_port,
        runtime_env_agent_port=environment_port,
    )

    def start_with_port_file(node: Any, *arguments: Any, **options: Any) -> Any:
        if hasattr(raylet, "persist_port"):  # not in every version of Ray that is accepted
            name = raylet.DASHBOARD_AGENT_LISTEN_PORT_NAME
            raylet.persist_port(node.get_session_dir_path(), node.node_id, name, dashboard_port)
        return start_node(node, *arguments, **options)

    node_type.start_raylet = start_with_port_file
    try:
        yield
    finally:
        parameter.RayParams, node_type.start_raylet = original, start_node


def free_ports(count: int) -> list[int]:
    """Return different free ports of the loopback address, at random: another cluster may choose at the same time."""
    with ExitStack() as sockets:
        ports: list[int] = []
        for port in random.sample(AGENT_PORTS, len(AGENT_PORTS)):
            candidate = sockets.enter_context(socket.socket())
            with suppress(OSError):
                candidate.bind((LOOPBACK_ADDRESS, port))
                ports.append(port)
            if len(ports) == count:
                break
        return ports


@contextmanager
def _patient_start(timeout_s: float = START_TIMEOUT_S) -> Iterator[None]:
    """Let `ray.init` wait longer for the processes that it has started, which is a constant in Ray, during the block.

    On a busy machine, such as one with several workers of DVC's queue, 30 seconds are too short.
    """
    import ray

    services: Any = ray._private.services
    original = services.get_node

    def get_node(*arguments: Any) -> Any:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return original(*arguments)
            except RuntimeError:  # the node has not registered yet
                if time.monotonic() > deadline or not _is_node_alive():
                    raise
            time.sleep(0.1)

    services.get_node = get_node
    try:
        yield
    finally:
        services.get_node = original


def _is_node_alive() -> bool:
    """Return whether Ray's process of a node, which this process has started, lives."""
    import psutil

    with suppress(psutil.NoSuchProcess):  # another child ends meanwhile
        children = psutil.Process().children()
        return any(child.name() == "raylet" and child.status() != psutil.STATUS_ZOMBIE for child in children)
    return True


def is_private(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether the cluster of a stage is, or would be, one that was started here."""
    return PRIVATE_CLUSTER_VARIABLE in environment or not environment.get("RAY_ADDRESS")


def workers_on_cluster(config: ClusterConfig) -> int:
    """Return the largest number of workers of a stage on the connected cluster.

    With a range, these are as many as a private cluster holds: it stays as it is. Another cluster may grow.
    """
    import ray

    if not is_private():
        return config.max_workers
    return min(private_cluster_workers(config), config.clamp_workers(worker_capacity(ray.nodes(), config)))


def lost_worker_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions that Ray raises when a worker or its node ends."""
    from ray import exceptions

    return (
        exceptions.RayActorError,
        exceptions.ObjectLostError,
        exceptions.OutOfMemoryError,
        exceptions.NodeDiedError,
        exceptions.WorkerCrashedError,
    )


def _init_ray(**options: Any) -> None:
    """Call `ray.init` with the output of Ray and of its workers kept off the terminal."""
    import ray

    # Otherwise Ray prints pages about a dead node. The stage reports what the loss means in one line.
    ray._private.worker._worker_logs_enabled = False
    with _keep_sigterm_handler():
        ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)


@contextmanager
def _keep_sigterm_handler() -> Iterator[None]:
    """Restore the SIGTERM handler after the block: `ray.init` installs one that prints a stack trace."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
