"""Workers that fit on a cluster: of a private one, of the nodes of another one."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from stages.cluster_config import ClusterConfig
from stages.errors import UserError


def private_workers(config: ClusterConfig) -> int:
    """Return the number of workers of a stage on a private cluster.

    Of a range, these are as many as this machine has CPUs for, whatever the number of GPUs: that is known later.
    """
    if config.gpus_per_worker:
        return config.max_workers
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return config.fitting_workers(math.floor(processors / config.cpus_per_worker))


def private_cpus(config: ClusterConfig) -> int:
    """Return the CPUs of a private cluster: as many as the stage needs that needs most, and a spare one.

    The processes that only coordinate must never wait for the workers.
    """
    return 1 + max(int(private_workers(variant) * variant.cpus_per_worker) for variant in config.variants())


def check_resources(config: ClusterConfig) -> None:
    """Raise UserError if the cluster has too few CPUs or GPUs for the workers, in total or on each node.

    Ray would wait for the missing resources without end.
    """
    import ray

    check_capacity(config, ray.cluster_resources(), ray.nodes())


def check_capacity(config: ClusterConfig, total: Mapping[str, float], nodes: Sequence[Mapping[str, Any]]) -> None:
    """Raise UserError if the workers do not fit into `total`, or into the live ones of `nodes` as Ray lists them."""
    workers = config.min_workers
    for resource, needed in (("CPU", workers * config.cpus_per_worker), ("GPU", workers * config.gpus_per_worker)):
        available = total.get(resource, 0)
        if available < needed:
            fewer_cpus = "cluster.workers=1" if workers > 1 else "cluster.cpus_per_worker=1"
            override = "cluster=local" if resource == "GPU" else fewer_cpus
            raise UserError(
                f"{workers} workers need {needed:g} {resource}s; the cluster has {available:g}.",
                where="params.yaml: cluster",
                fix=f"Ask for less, such as -S {override}, or add nodes.",
                code=3,
            )
    capacity = worker_capacity(nodes, config)
    if capacity < workers:
        gpus = f" and {config.gpus_per_worker:g} GPUs" if config.gpus_per_worker else ""
        raise UserError(
            f"{workers} workers need {config.cpus_per_worker:g} CPUs{gpus} each; "
            f"the nodes have room for {capacity} such workers.",
            where="params.yaml: cluster",
            fix="Ask for fewer workers or smaller ones: cluster.workers, cluster.cpus_per_worker.",
            code=3,
        )


def worker_capacity(nodes: Sequence[Mapping[str, Any]], config: ClusterConfig) -> int:
    """Return the number of workers for which the live ones of `nodes` have room."""
    return sum(_node_capacity(node["Resources"], config) for node in nodes if node["Alive"])


def _node_capacity(node_resources: Mapping[str, float], config: ClusterConfig) -> int:
    """Return the number of workers that fit on a node."""
    needs = {"CPU": config.cpus_per_worker, "GPU": config.gpus_per_worker}
    # The small number keeps 0.6 / 0.2, which is 2.9999999999999996, from being rounded down to 2.
    return min(
        math.floor(node_resources.get(resource, 0) / needed + 1e-6) for resource, needed in needs.items() if needed
    )
