"""The Ray cluster a stage runs on: the one named by RAY_ADDRESS, or a private one on this machine.

A whole pipeline run starts one private cluster and ends it, since each start costs seconds; its stages find it by
RAY_ADDRESS. Every cluster started here asks for a token and listens on this machine alone.
"""

import logging
import math
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stages.config import ClusterConfig
from stages.errors import UserError

CONNECT_TIMEOUT_S = 5.0
OURS = "VQVAE2_PRIVATE_CLUSTER"  # set beside RAY_ADDRESS when the cluster was started here
PACKAGES = Path(__file__).parents[2]  # where pipeline/, stages/ and models/ lie
LOOPBACK, LOOPBACK_ONLY = "127.0.0.1", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # set to 0, Ray listens there on any system
if not os.environ.get("RAY_ADDRESS"):
    # Here rather than where the cluster is started: Ray reads all this when it is first imported, by whomever.
    os.environ.setdefault(LOOPBACK_ONLY, "0")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

# Environment a worker elsewhere needs as well.
STORES = ("AWS_", "AZURE_", "FSSPEC_", "GOOGLE_")
FORWARDED = (*STORES, "GLOO_", "MALLOC_", "MLFLOW_", "NCCL_", "OMP_", "RAY_TRAIN_", "VQVAE2_FAULT")


@contextmanager
def local_cluster(config: ClusterConfig) -> Iterator[dict[str, str]]:
    """Start a cluster on this machine; yield the environment by which other processes join it."""
    with _started(config) as address:
        yield {
            "RAY_ADDRESS": address,
            **{name: value for name, value in os.environ.items() if name.startswith(("RAY_AUTH_", LOOPBACK_ONLY))},
            OURS: "1",
        }


@contextmanager
def connect_cluster(config: ClusterConfig) -> Iterator[None]:
    """Join the cluster at RAY_ADDRESS, or start one for the length of the block; check that it is large enough."""
    import ray

    if ray.is_initialized():
        check(config)
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        with _started(config):
            check(config)
            yield
        return
    runtime_env = {}
    if OURS not in os.environ:
        # Other machines have neither this code nor this environment.
        runtime_env = {
            "py_modules": [str(PACKAGES / package) for package in ("stages", "models")],
            "excludes": ["__pycache__"],
            "env_vars": {name: value for name, value in os.environ.items() if name.startswith(FORWARDED)},
            "worker_process_setup_hook": f"{__name__}.{name_interface.__name__}",
        }
    try:
        _reach(address)
        _init(address=address, runtime_env=runtime_env)
    except Exception as error:  # Ray raises many kinds here, none of them meant for users
        if str(error).startswith("Version mismatch"):
            raise UserError(
                " ".join(str(error).split()).rstrip(".") + ".",
                where=f"RAY_ADDRESS={address}",
                fix="Install the cluster's versions of Ray and Python here, or these there.",
                code=3,
            ) from error
        raise UserError(
            f"The Ray cluster does not answer: {str(error).splitlines()[0]}",
            where=f"RAY_ADDRESS={address}",
            fix="Run the same command again; it starts another."
            if OURS in os.environ
            else "Check the address and the token (RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH), or unset RAY_ADDRESS "
            "to run on this machine.",
            code=3,
        ) from error
    try:
        check(config)
        yield
    finally:
        ray.shutdown()


def name_interface() -> None:
    """Tell gloo which interface leads to the other nodes, in a worker that has just started.

    Left alone it takes what the host's name resolves to, which is loopback on many systems.
    """
    import ray.util

    _name_interface(ray.util.get_node_ip_address())


def _name_interface(here: str) -> None:
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if here in (address.address for address in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _reach(address: str) -> None:
    """Fail in seconds where nobody listens; Ray tries for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdecimal():  # "auto" and the like are Ray's to find
        socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()


@contextmanager
def _started(config: ClusterConfig) -> Iterator[str]:
    import ray

    if os.environ.get(LOOPBACK_ONLY) == "0":
        _name_interface(LOOPBACK)
    _init(
        address="local",
        # One CPU more than the workers take: the processes that only coordinate must never wait for one.
        num_cpus=int(config.workers * config.cpus_per_worker) + 1,
        include_dashboard=False,
        object_store_memory=500 * 2**20,
    )
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()


def _init(**options: Any) -> None:
    """Join or start a cluster; nothing of what its processes say reaches the terminal."""
    import ray

    # Pages about a node that has died, in yellow: what comes of it for a stage, the stage says in a line.
    ray._private.worker._worker_logs_enabled = False
    with _our_signals():
        ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)


@contextmanager
def _our_signals() -> Iterator[None]:
    """Keep our own answer to SIGTERM: Ray puts one in its place that prints a stack trace."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def check(config: ClusterConfig) -> None:
    """Refuse in seconds what Ray would wait for without end: what all nodes together lack, or what fits on none."""
    import ray

    has = ray.cluster_resources()
    for what, needed in (
        ("CPU", config.workers * config.cpus_per_worker),
        ("GPU", config.workers * config.gpus_per_worker),
    ):
        if has.get(what, 0) < needed:
            fewer = "cluster.workers=1" if config.workers > 1 else "cluster.cpus_per_worker=1"
            less = "cluster=local" if what == "GPU" else fewer
            raise UserError(
                f"{config.workers} workers need {needed:g} {what}s; the cluster has {has.get(what, 0):g}.",
                where="params.yaml: cluster",
                fix=f"Ask for less, such as -S {less}, or add nodes.",
                code=3,
            )
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if (fit := sum(_room(node, config) for node in nodes)) < config.workers:
        gpus = f" and {config.gpus_per_worker:g} GPUs" if config.gpus_per_worker else ""
        raise UserError(
            f"{config.workers} workers of {config.cpus_per_worker:g} CPUs{gpus} are to run; nodes have room for {fit}.",
            where="params.yaml: cluster",
            fix="Ask for fewer workers or smaller ones: cluster.workers, cluster.cpus_per_worker.",
            code=3,
        )


def _room(node: Mapping[str, float], config: ClusterConfig) -> int:
    """Count the workers that fit on a node."""
    needs = {"CPU": config.cpus_per_worker, "GPU": config.gpus_per_worker}
    return min(math.floor(node.get(what, 0) / needed + 1e-6) for what, needed in needs.items() if needed)
