"""Capacity of a cluster: how many workers fit, and the error if too few do."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from stages.cluster_config import ClusterConfig
from stages.errors import UserError


def private_cluster_workers(config: ClusterConfig) -> int:
    """Return the number of workers of a stage on a private cluster.

    Of a range, as many as the CPUs of this machine allow. Workers with GPUs: the largest number, because the number of
    GPUs is known only once the cluster runs.
    """
    if config.gpus_per_worker:
        return config.max_workers
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return config.clamp_workers(math.floor(processors / config.cpus_per_worker))


def private_cluster_cpus(config: ClusterConfig) -> int:
    """Return the CPUs of a private cluster: the largest need of a stage, and one for the processes that coordinate.

    These must not wait for the workers. They share a part of a CPU that the workers leave.
    """
    return 1 + max(int(private_cluster_workers(variant) * variant.cpus_per_worker) for variant in config.variants())


def check_resources(config: ClusterConfig) -> None:
    """Raise UserError if the cluster has too few CPUs or GPUs for the workers, in total or on single nodes.

    A worker must fit on one node. Ray would wait for the missing resources forever.
    """
    import ray

    check_capacity(config, ray.cluster_resources(), ray.nodes())


def check_capacity(config: ClusterConfig, total: Mapping[str, float], nodes: Sequence[Mapping[str, Any]]) -> None:
    """Raise UserError if `min_workers` do not fit into `total`, or onto the live ones of `nodes`, the list of Ray."""
    workers = config.min_workers
    need = f"{workers} worker{'s need' if workers > 1 else ' needs'}"
    if not isinstance(config.workers, int):
        need = f"At least {need}"
    for resource, needed in (("CPU", workers * config.cpus_per_worker), ("GPU", workers * config.gpus_per_worker)):
        available = total.get(resource, 0)
        if available < needed:
            fewer_cpus = "cluster.workers=1" if workers > 1 else "cluster.cpus_per_worker=1"
            override = "cluster=local" if resource == "GPU" else fewer_cpus
            raise UserError(
                f"{need} {needed:g} {resource}{'s' * (needed != 1)}; the cluster has {available:g}.",
                where="params.yaml: cluster",
                fix=f"Ask for less, such as -S {override}, or add nodes.",
                code=3,
            )
    capacity = worker_capacity(nodes, config)
    if capacity < workers:
        gpus = f" and {config.gpus_per_worker:g} GPUs" if config.gpus_per_worker else ""
        raise UserError(
            f"{need} {config.cpus_per_worker:g} CPUs{gpus}{' each' * (workers > 1)}; "
            f"the nodes have room for {capacity} such workers.",
            where="params.yaml: cluster",
            fix="Lower cluster.workers or cluster.cpus_per_worker, or add nodes.",
            code=3,
        )


def worker_capacity(nodes: Sequence[Mapping[str, Any]], config: ClusterConfig) -> int:
    """Return the number of workers for which the live ones of `nodes` have room."""
    return sum(_node_capacity(node["Resources"], config) for node in nodes if node["Alive"])


def _node_capacity(node_resources: Mapping[str, float], config: ClusterConfig) -> int:
    """Return the number of workers that fit on a node."""
    needs = {"CPU": config.cpus_per_worker, "GPU": config.gpus_per_worker}
    # 1e-6 keeps 0.6 / 0.2, which is 2.9999999999999996, from being rounded down to 2.
    return min(math.floor(node_resources.get(resource, 0) / need + 1e-6) for resource, need in needs.items() if need)
