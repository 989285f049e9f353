"""Failures of Ray Train become one error for the user, without Ray's own messages."""

from dataclasses import replace
from pathlib import Path

import pytest
import ray.exceptions
import ray.train
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)

from stages.config import ClusterConfig
from stages.errors import UserError
from stages.runtime.context import StageContext
from stages.training.distributed import CheckpointMismatch
from stages.training.failures import (
    describe_failure,
    describe_loss_at_start,
    failure_callback,
    is_loss_at_start,
    root_cause,
    summarize_error,
    training_error,
)
from stages.training.ray_train import _train_until_complete
from tests.screen import Screen


@pytest.fixture
def context(tmp_path: Path) -> StageContext:
    return StageContext("vqvae", "f", tmp_path, ClusterConfig(workers=2))


@pytest.mark.parametrize(
    ("first", "description"),
    [
        (UserError("Image 7 is damaged.", where="a shard", fix="Replace it."), ""),
        (
            ray.exceptions.OutOfMemoryError("Memory was 23GB used / 24GB limit"),
            "was lost: its node ran out of memory.",
        ),
        (ray.exceptions.ActorDiedError(), "was lost: its process or its node ended."),
        (WorkerHealthCheckTimeoutError("Worker 1 hangs"), "was lost: it stopped responding."),
        (ValueError("a bug"), ""),
    ],
)
def test_the_root_cause_is_not_a_lost_connection_to_a_peer(first: Exception, description: str):
    """A worker whose peer is gone fails in a collective, often before Ray notices the peer."""
    broken = RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection closed by peer")
    peer_failure = UserExceptionWithTraceback(broken, "a traceback")
    first_failure = WorkerHealthCheckFailedError("A worker health check failed.", first)
    assert root_cause({0: peer_failure, 1: first_failure}) == (1, first)
    assert root_cause({0: peer_failure}) == (0, broken)
    assert describe_failure(first) == description
    assert describe_failure(broken) == "lost connection to a peer."


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_end_of_the_cluster_is_one_sentence(wrapped: bool):
    """The message of a lost actor is replaced; the last line of any other controller error is kept."""
    lost = ray.exceptions.ActorUnavailableError("RpcError: RPC error: Socket closed rpc_code: 14", None)
    summary = summarize_error(ray.train.ControllerError(lost) if wrapped else lost)
    assert summary == "the Ray cluster or the node of the training controller ended."
    assert summarize_error(ray.train.ControllerError(OSError("a\nno space"))) == "no space"


def test_a_controller_error_becomes_a_user_error(context: StageContext):
    """It has the controller's own message, the work folder and the fix."""
    error = training_error(ray.train.ControllerError(OSError("the storage is full")), context)
    assert isinstance(error, UserError) and error.code == 3
    assert error.what == "Training could not continue: the storage is full" and error.where == str(context.work_dir)
    assert error.fix == "Run the same command again; it continues from the newest checkpoint."


LOST = ray.exceptions.ActorUnavailableError("The actor died.\n\tpid: 7\n\tip: 10.0.0.7\nIt is dead.", None)


def test_a_loss_at_the_start_is_told_from_errors_of_the_controller():
    """Ray Train takes both for errors of the controller. The error of a lost controller itself has no cause."""
    for cause in (LOST, ray.exceptions.OutOfMemoryError("full"), ray.exceptions.NodeDiedError("a node")):
        assert is_loss_at_start(ray.train.ControllerError(cause))
    assert not is_loss_at_start(ray.train.ControllerError(OSError("no space")))
    assert not is_loss_at_start(LOST)
    message = "When training began, a worker on 10.0.0.7 was lost: its process or its node ended."
    assert describe_loss_at_start(ray.train.ControllerError(LOST)) == message


@pytest.mark.parametrize("max_failures", [0, 2])
def test_losses_at_the_start_count_as_failures(context: StageContext, max_failures: int):
    """Training starts again until there are more than `cluster.max_failures` of them."""
    context = replace(context, cluster=ClusterConfig(max_failures=max_failures))
    budgets: list[int] = []

    def train(budget: int) -> None:
        budgets.append(budget)
        raise ray.train.ControllerError(LOST)

    with pytest.raises(UserError, match="When training began, a worker") as caught:
        _train_until_complete(train, lambda error: len(budgets), context)
    assert budgets == list(range(max_failures, -1, -1))
    assert caught.value.what.startswith(
        f"Workers failed {max_failures + 1} times; cluster.max_failures is {max_failures}."
    )


def test_failures_of_all_attempts_have_one_limit(context: StageContext):
    """Ray Train has retried one failure before the loss, so one less remains; other errors are not retried."""
    budgets: list[int] = []

    def train(budget: int) -> None:
        budgets.append(budget)
        raise ray.train.ControllerError(LOST if len(budgets) == 1 else OSError("no space"))

    context = replace(context, cluster=ClusterConfig(max_failures=3))
    with pytest.raises(UserError, match="Training could not continue: no space"):
        _train_until_complete(train, lambda error: 2, context)
    assert budgets == [3, 1]


def test_a_startup_timeout_reports_the_missing_resources(context: StageContext):
    """The check of the cluster says what is missing; the controller only that time was up."""

    def too_small(config: ClusterConfig) -> None:
        raise UserError("2 workers need 2 CPUs; the cluster has 1.", where="cluster", fix="Add nodes.", code=3)

    with pytest.raises(UserError, match=r"2 workers need 2 CPUs; the cluster has 1\."):
        training_error(ray.train.ControllerError(OSError("Worker group startup timed out")), context, too_small)


def test_a_repeated_checkpoint_mismatch_becomes_a_user_error(context: StageContext):
    """It has the steps, and the setting for nodes without a shared disk."""
    mismatch = CheckpointMismatch("The newest checkpoints of all workers must be of the same step, got steps 4, 8.")
    failures = {1: UserExceptionWithTraceback(mismatch, "a traceback")}
    error = training_error(ray.train.WorkerGroupError("failed", failures), context)
    assert isinstance(error, UserError) and error.code == 3
    assert error.what == str(mismatch) and error.where == str(context.work_dir)
    assert error.fix == "Run the same command again. If the nodes share no disk, set cluster.storage first."


def test_an_error_of_a_worker_is_reported_when_ray_train_restarts_it():
    """The message has the rank and the error. A UserError ends training and is not reported twice."""
    screen = Screen()
    counted: list[bool] = []
    callback = failure_callback(screen, counted.append)
    callback.after_exception(None, {1: UserExceptionWithTraceback(RuntimeError("a\nno luck"), "a traceback")})
    callback.after_exception(None, {0: UserError("Image 7 is damaged.", where="a shard", fix="Replace it.")})
    assert screen.messages == ["Worker 1 raised RuntimeError: no luck"] and counted == [False] * 2


def test_the_preemption_of_a_node_is_no_failure():
    """Workers on other nodes lose the connection, and their errors count as little."""
    screen = Screen()
    counted: list[bool] = []
    callback = failure_callback(screen, counted.append)
    lost = WorkerHealthCheckFailedError("lost", ray.exceptions.RayActorError(preempted=True))
    callback.after_exception(None, {0: RuntimeError("gloo: connection reset"), 1: lost})
    assert counted == [True] and screen.messages == ["Worker 1 was lost: its node was preempted."]
