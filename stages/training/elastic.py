"""Elastic training: the number of workers adapts to the nodes of the cluster, within the range of `cluster.workers`.

The result stays the same within rounding: neither the global batch nor the order of the data depends on that number.
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
# After the loss of a node, Ray Train may request more workers than fit. A shorter timeout than its 60 s makes it count
# the nodes again soon. Each such timeout counts as a failure of the controller.
WORKER_START_TIMEOUT_S = 10
MAX_ELASTIC_CONTROLLER_FAILURES = 1000  # over the whole training; `capacity_check` ends one that cannot continue
CAPACITY_TIMEOUT_S = 240.0  # for nodes to come back if `min_workers` do not fit; Ray Train waits forever
CAPACITY_POLL_INTERVAL_S = 2.0
CANCEL_TIMEOUT_S = 2.0
COORDINATOR = "AutoscalingCoordinator"  # name and namespace of the actor that tells Ray Train which nodes there are


def is_elastic(config: ClusterConfig) -> bool:
    """Return whether the number of workers changes with the nodes. The size of a private cluster is fixed."""
    return not isinstance(config.workers, int) and not cluster.is_private()


def num_workers(config: ClusterConfig) -> int | tuple[int, int]:
    """Return Ray Train's `num_workers`: (min, max) if training is elastic, otherwise a number."""
    return config.workers if is_elastic(config) else cluster.workers_on_cluster(config)


def max_controller_failures(config: ClusterConfig) -> int:
    """Return how many failures of its controller, such as failed starts of the workers, Ray Train tolerates."""
    return MAX_ELASTIC_CONTROLLER_FAILURES if is_elastic(config) else MAX_CONTROLLER_FAILURES


@contextmanager
def ray_train_variables(config: ClusterConfig) -> Iterator[None]:
    """Set environment variables for the block; Ray Train passes them to its controller.

    A value that the user has set stays. The preemption watcher is off on a private cluster: its node is never
    preempted, and watching costs time.
    """
    values = {}
    if is_elastic(config):
        values["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(WORKER_START_TIMEOUT_S)
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
    """Make Ray Train's coordinator read the nodes again, which it otherwise does every 20 s. Needs Ray 2.60."""
    import ray

    with suppress(Exception):  # private API of Ray, which may change; without it training only waits longer
        ray.get_actor(COORDINATOR, namespace=COORDINATOR).get_reserved_resources.remote("", recompute=True)


def capacity_check(
    config: ClusterConfig,
    check_resources: Callable[[ClusterConfig], None] = cluster.check_resources,
    live_nodes: Callable[[], set[str]] = _live_nodes,
    clock: Callable[[], float] = time.monotonic,
) -> Callable[[], None]:
    """Return a function that raises UserError once `min_workers` have not fitted for CAPACITY_TIMEOUT_S.

    It also reports changed nodes to Ray Train, so that it does not try to start too many workers. With a fixed
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
            pass

    return check


def release_reservation(trainer: Any) -> None:
    """Release the resources that Ray Train reserved for an interrupted training.

    The reservation would last three minutes, and block the next elastic training.
    """
    import ray

    with suppress(Exception):  # private API of Ray, as above
        coordinator = ray.get_actor(COORDINATOR, namespace=COORDINATOR)
        run_id = trainer.train_run_context.run_id
        ray.get(coordinator.cancel_request.remote(f"train-{run_id}"), timeout=CANCEL_TIMEOUT_S)


def report_workers(workers: int, previous: int, context: StageContext) -> None:
    """Report the number of workers of an attempt, unless it is the `previous` one; that is 0 at the start."""
    number = f"{workers} worker{'s' * (workers != 1)}"
    if not previous:
        context.reporter.message(f"Training starts with {number} of at most {context.cluster.max_workers}.")
    elif workers != previous:
        context.reporter.message(f"Training continues with {number} instead of {previous}.")
