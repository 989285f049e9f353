"""Elastic training: the number of workers follows the nodes of a cluster, within the range of `cluster.workers`.

The result stays the same within rounding, because neither the global batch nor the order of the data depends on it.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from stages.cluster_config import ClusterConfig
from stages.errors import UserError
from stages.runtime import cluster
from stages.runtime.context import StageContext

MAX_CONTROLLER_FAILURES = 3  # Ray Train's default restarts a failing controller without limit
# With a range of workers, Ray Train may try to start too many after the loss of a node, and then waits for a node that
# does not come: it waits for a shorter time than its 60 s, and may do so more often.
START_TIMEOUT_S, MAX_ELASTIC_CONTROLLER_FAILURES = 10, 60
CAPACITY_TIMEOUT_S = 240.0  # for nodes to come back if fewer than the fewest workers fit; Ray Train waits for ever
CAPACITY_POLL_INTERVAL_S = 2.0
CANCEL_TIMEOUT_S = 2.0
COORDINATOR = "AutoscalingCoordinator"  # name and namespace of the actor that tells Ray Train which nodes there are


def is_elastic(config: ClusterConfig) -> bool:
    """Return whether the number of workers changes with the nodes. A private cluster stays as it is."""
    return not isinstance(config.workers, int) and not cluster.is_private()


def num_workers(config: ClusterConfig) -> int | tuple[int, int]:
    """Return the number of workers for Ray Train, or the range."""
    return config.workers if is_elastic(config) else cluster.most_workers(config)


def max_controller_failures(config: ClusterConfig) -> int:
    """Return how often Ray Train may fail to start workers."""
    return MAX_ELASTIC_CONTROLLER_FAILURES if is_elastic(config) else MAX_CONTROLLER_FAILURES


@contextmanager
def ray_train_variables(config: ClusterConfig) -> Iterator[None]:
    """Set variables of Ray Train during the block, which it passes on to its controller.

    A value that the user has set stays. Nobody preempts the node of a private cluster, and looking for that takes time.
    """
    values = {}
    if is_elastic(config):
        values["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(START_TIMEOUT_S)
    if cluster.is_private():
        values["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    names = values.keys() - os.environ.keys()
    os.environ.update({name: values[name] for name in names})
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)


def _live_nodes() -> set[str]:
    import ray

    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def _refresh_coordinator() -> None:
    """Let Ray Train see the nodes as they are now. Otherwise it does within 20 s (Ray 2.60 and newer)."""
    import ray

    with suppress(Exception):  # no part of Ray's public interface
        ray.get_actor(COORDINATOR, namespace=COORDINATOR).get_reserved_resources.remote("", recompute=True)


def capacity_check(
    config: ClusterConfig,
    check_resources: Callable[[ClusterConfig], None] = cluster.check_resources,
    live_nodes: Callable[[], set[str]] = _live_nodes,
    clock: Callable[[], float] = time.monotonic,
) -> Callable[[], None]:
    """Return a function that raises UserError once the fewest workers have not fitted for CAPACITY_TIMEOUT_S.

    It also tells Ray Train of a change of the nodes, so that it does not try to start too many workers. With a fixed
    number of workers it does nothing: Ray Train gives up by itself.
    """
    if not is_elastic(config):
        return lambda: None
    last_fit, last_nodes = clock(), live_nodes()

    def check() -> None:
        nonlocal last_fit, last_nodes
        try:
            if (nodes := live_nodes()) != last_nodes:
                last_nodes = nodes
                _refresh_coordinator()
            check_resources(config)
            last_fit = clock()
        except UserError:
            if clock() - last_fit > CAPACITY_TIMEOUT_S:
                raise
        except Exception:  # the cluster is gone; training raises the error
            return

    return check


def cancel_request(trainer: Any) -> None:
    """Cancel what Ray Train has reserved for a training that was interrupted.

    The reservation would last for three minutes, in which the next training with a range finds no room.
    """
    import ray

    with suppress(Exception):  # no part of Ray's public interface
        coordinator = ray.get_actor(COORDINATOR, namespace=COORDINATOR)
        run_id = trainer.train_run_context.run_id
        ray.get(coordinator.cancel_request.remote(f"train-{run_id}"), timeout=CANCEL_TIMEOUT_S)


def report_workers(workers: int, previous: int, context: StageContext) -> None:
    """Report the number of workers with which training starts or continues, unless it is the previous one."""
    number = f"{workers} worker{'s' * (workers != 1)}"
    if not previous:
        context.reporter.message(f"Training starts with {number} of at most {context.cluster.max_workers}.")
    elif workers != previous:
        context.reporter.message(f"Training continues with {number} instead of {previous}.")
