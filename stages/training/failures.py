"""Messages for failures of Ray Train: the worker that failed first, and why, in one sentence."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed

from stages.cluster_config import ClusterConfig
from stages.errors import UserError
from stages.runtime import cluster
from stages.runtime.context import Reporter, StageContext
from stages.training.distributed import CheckpointMismatch

# Attributes under which Ray's exceptions hold the exception that caused them.
CAUSE_ATTRIBUTES = ("cause", "_base_exc", "health_check_failure")


def training_error(
    error: Exception, context: StageContext, check_cluster: Callable[[ClusterConfig], None] = cluster.check_resources
) -> BaseException:
    """Convert an error of Ray Train to the one that the user gets.

    That is the error a worker raised itself, or a UserError if a worker, a node or the controller was lost. Raises
    UserError if the cluster has become too small.
    """
    import ray.train

    if is_loss_at_start(error):
        return _workers_failed(context, describe_loss_at_start(error))
    if isinstance(error, ray.train.WorkerGroupError):
        rank, cause = root_cause(error.worker_failures)
        if description := describe_failure(cause):
            return _workers_failed(context, f"Worker {rank}{_node(error.worker_failures[rank])} {description}")
        if isinstance(cause, CheckpointMismatch):
            return UserError(
                str(cause),
                where=context.work_dir,
                fix="Run the same command again. If the nodes share no disk, set cluster.storage first.",
                code=3,
            )
        return cause
    if "startup timed out" in str(error):
        check_cluster(context.cluster)  # a node may have left, and the check says what is missing
    return interruption_error(error, context)


def interruption_error(error: Exception, context: StageContext) -> UserError:
    """Create the error for training that ended for a reason outside of the workers."""
    return UserError(
        f"Training could not continue: {summarize_error(error)}",
        where=context.work_dir,
        fix="Run the same command again; it continues from the newest checkpoint.",
        code=3,
    )


def is_loss_at_start(error: Exception) -> bool:
    """Return whether a worker, or another actor, was lost when the training functions were launched.

    Ray Train takes this for an error of the controller, which it does not retry (WorkerGroup._start_impl, Ray 2.60).
    """
    return isinstance(getattr(error, "controller_failure", None), cluster.lost_worker_errors())


def describe_loss_at_start(error: Any) -> str:
    """Describe the loss of which `is_loss_at_start` is true, in one sentence."""
    cause = error.controller_failure
    return f"When training began, a worker{_node(cause)} {describe_failure(cause)}"


def _workers_failed(context: StageContext, last_failure: str) -> UserError:
    max_failures = context.cluster.max_failures
    return UserError(
        f"Workers failed {max_failures + 1} times; cluster.max_failures is {max_failures}. {last_failure}",
        where=context.work_dir,
        fix="Check that the nodes stay up and have enough memory, then run the same command again; it continues from "
        "the newest checkpoint.",
        code=3,
    )


def failure_callback(reporter: Reporter, count_failure: Callable[[bool], object]) -> Any:
    """Create a callback with which Ray Train counts failures of workers, and reports why it restarts them.

    It calls `count_failure(is_preemption)`.
    """
    from ray.train import UserCallback

    class ReportFailures(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, BaseException]) -> None:
            # Ray Train decides in the same way: when one node is preempted, the workers on others fail as well.
            count_failure(any(is_preemption(error) for error in worker_exceptions.values()))
            rank, cause = root_cause(worker_exceptions)
            if not isinstance(cause, UserError):  # a UserError ends training, and the command prints it
                description = describe_failure(cause) or f"raised {type(cause).__name__}: {summarize_error(cause)}"
                reporter.message(f"Worker {rank}{_node(worker_exceptions[rank])} {description}")

    return ReportFailures()


def root_cause(failures: Mapping[int, BaseException]) -> tuple[int, BaseException]:
    """Return the rank that failed first, and its error.

    When one worker fails, its peers fail in the next collective. So the order is: an error of the user, a lost worker,
    any other error, and last a lost connection to a peer.
    """

    def order(failure: tuple[int, BaseException]) -> int:
        error = failure[1]
        if isinstance(error, UserError):
            return 0
        return 3 if is_peer_failure(error) else 1 if describe_failure(error) else 2

    return min(((rank, _unwrap(failures[rank])) for rank in sorted(failures)), key=order)


def describe_failure(error: BaseException) -> str:
    """Describe how a worker was lost; "" if it raised an error of its own."""
    name = type(error).__name__
    if is_peer_failure(error):
        return "lost connection to a peer."
    if not type(error).__module__.startswith("ray."):
        return ""
    if "OutOfMemory" in name:
        return "was lost: its node ran out of memory."
    if is_preemption(error):
        return "was lost: its node was preempted."
    return "was lost: " + ("it stopped responding." if "Timeout" in name else "its process or its node ended.")


def is_peer_failure(error: BaseException) -> bool:
    """Return whether a collective failed because a peer was gone."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def is_preemption(error: BaseException) -> bool:
    """Return whether a worker was lost because its node was taken away, as announced before."""
    return bool(getattr(_unwrap(error), "preempted", False))  # of Ray's RayActorError


def summarize_error(error: BaseException) -> str:
    """Return the last line of an error's message; for a lost actor of Ray, one sentence."""
    import ray

    cause = getattr(error, "controller_failure", error)
    if isinstance(cause, ray.exceptions.RayActorError):  # its message quotes Ray's RPC protocol
        return "the Ray cluster or the node of the training controller ended."
    return str(cause).strip().splitlines()[-1] if str(cause).strip() else type(cause).__name__


def _node(failure: BaseException) -> str:
    """Return " on ADDRESS" if the message of a failure names the worker's node, else ""."""
    match = re.search(r"node_ip='([^']+)'|^\s*ip: (\S+)$", str(failure), re.MULTILINE)
    return f" on {match[1] or match[2]}" if match else ""


def _unwrap(error: BaseException) -> BaseException:
    while (cause := next(filter(None, (getattr(error, name, None) for name in CAUSE_ATTRIBUTES)), None)) is not None:
        error = cause
    return error
