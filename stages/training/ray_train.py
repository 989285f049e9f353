"""Training on one or many nodes: Ray Train starts and restarts processes that run the same training loop.

The workers report to the process that started them; only that process writes to the terminal and to MLflow. On nodes
without a shared disk, inputs and checkpoints go through the storage, and each worker has a folder on its own node.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from stages.config import TrainConfig
from stages.errors import UserError
from stages.runtime import cluster, fault_injection
from stages.runtime.context import Reporter, StageContext
from stages.runtime.control import (
    RemoteReporter,
    fail_without_retry,
    forward_reports,
    start_control_actor,
    start_in_thread,
    stop_requested,
)
from stages.runtime.node_cache import claim_folder, node_cache_dir
from stages.runtime.storage import Storage, StoredArtifact
from stages.training.checkpoint import Checkpoints
from stages.training.checkpoint_state import trained_weights
from stages.training.distributed import CheckpointTimer, DistributedContext, start_all_reduce, wrap_ddp
from stages.training.elastic import (
    CAPACITY_POLL_INTERVAL_S,
    capacity_check,
    is_elastic,
    max_controller_failures,
    num_workers,
    ray_train_variables,
    release_reservation,
    report_workers,
)
from stages.training.failures import (
    describe_loss_at_start,
    failure_callback,
    interruption_error,
    is_loss_at_start,
    is_preemption,
    training_error,
)
from stages.training.loop import TrainingStopped
from stages.training.node_checkpoints import fetch_same_checkpoint, is_first_on_node

SAVE_TIMEOUT_S = 15.0  # for the workers to save after a signal; preempted machines get 20 to 30 s
SAVE_POLL_INTERVAL_S = 0.1
COLLECTIVE_TIMEOUT_S = 300  # a rank gives up on its peers after this
UPLOAD_TIMEOUT_S = 3600  # the same with a storage, where peers may wait for rank 0 to upload a checkpoint
# Callbacks of Ray Train that start an actor: for shards of Ray Data, which no stage passes to training; and for the
# placement groups of a controller that has died, which it asks the dashboard about. A private cluster has no dashboard:
# there every question fails, each second, and training waits for it at both ends.
UNUSED_CALLBACKS = ("DatasetsCallback", "PlacementGroupCleanerCallback")

# Function of a module that each worker calls with `dist`, `context` and its own arguments by name. It runs the loop.
TrainWorker = Callable[..., None]


def fit(train_worker: TrainWorker, arguments: Mapping[str, Any], *, context: StageContext) -> None:
    """Call `train_worker(dist=, context=, **arguments)` on every worker and return when all have finished.

    Both travel to other nodes, which have another current folder: `train_worker` must be importable, and `arguments`
    plain data with absolute paths. Raises the error of the worker that failed first if that worker raised it itself,
    and UserError if workers were lost repeatedly or the cluster ended.
    """
    config = context.cluster
    with cluster.connect_cluster(config), _ray_storage(context) as storage_settings:
        if config.storage:
            storage = Storage(config.storage)
            arguments = {
                name: StoredArtifact.upload(value, storage) if isinstance(value, Path) else value
                for name, value in arguments.items()
            }
        control = start_control_actor()

        def train(max_failures: int) -> None:
            trainer = _build_trainer(train_worker, arguments, context, control, storage_settings, max_failures)
            training = start_in_thread(trainer.fit, "fit")
            try:
                _wait_or_stop(training, control, capacity_check(config))
            finally:
                if not training.done():
                    release_reservation(trainer)

        with ray_train_variables(config), forward_reports(control, context.reporter):
            _train_until_complete(train, lambda error: _recover(error, context, control), context)


def _train_until_complete(train: Callable[[int], None], recover: Callable[[Any], int], context: StageContext) -> None:
    """Call `train(max_failures)`, and again after a loss that Ray Train does not retry itself.

    `recover` prepares the next attempt and returns the number of failures so far, in all attempts.
    """
    import ray

    max_failures, failures = context.cluster.max_failures, 0
    while True:
        try:
            train(max_failures - failures)
            return
        # RayActorError: the node of the training controller is gone.
        except (ray.train.WorkerGroupError, ray.train.ControllerError, ray.exceptions.RayActorError) as error:
            if not is_loss_at_start(error):
                raise training_error(error, context) from error
            failures = recover(error)
            if failures > max_failures:
                raise training_error(error, context) from error


def _recover(error: Any, context: StageContext, control: Any) -> int:
    """Report a loss at the start, free what the lost attempt has reserved, and return the number of failures so far.

    Raises the error of a worker that no retry can fix, and UserError if the control actor is gone or if the cluster has
    become too small.
    """
    import ray

    try:
        if fatal_error := ray.get(control.get_fatal_error.remote()):
            raise fatal_error
        failures: int = ray.get(control.count_failure.remote(is_preemption(error.controller_failure)))
        ray.get(control.report.remote("message", describe_loss_at_start(error)))
        _remove_placement_groups()
    except ray.exceptions.RayError:
        raise interruption_error(error, context) from error
    if not is_elastic(context.cluster):  # otherwise the next attempt waits for nodes
        cluster.check_resources(context.cluster)
    return failures


def _remove_placement_groups() -> None:
    """Free the resources that placement groups of this job reserve; the actors in them are killed.

    Ray frees them only when the job ends, not when the actor ends that created them.
    """
    import ray
    from ray.util.placement_group import PlacementGroup

    job = ray.get_runtime_context().get_job_id()
    for group, entry in ray.util.placement_group_table().items():
        if group.endswith(job) and entry["state"] != "REMOVED":  # an id ends with that of its job
            ray.util.remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group))))


def _build_trainer(
    train_worker: TrainWorker,
    arguments: Mapping[str, Any],
    context: StageContext,
    control: Any,
    storage_settings: Mapping[str, Any],
    max_failures: int,
) -> Any:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig

    config = context.cluster
    remote_context = replace(context, reporter=RemoteReporter(control))
    return trainer_class()(
        worker_main,
        train_loop_config={
            "train_worker": train_worker,
            "arguments": dict(arguments),
            "context": remote_context,
            "control": control,
        },
        scaling_config=ScalingConfig(
            num_workers=num_workers(config),  # type: ignore[arg-type]
            use_gpu=config.gpus_per_worker > 0,
            resources_per_worker=_resources(context),
        ),
        torch_config=TorchConfig(timeout_s=UPLOAD_TIMEOUT_S if config.storage else COLLECTIVE_TIMEOUT_S),
        run_config=RunConfig(
            name=f"attempt-{time.time_ns()}",  # Ray Train takes a name it knows for a finished run
            **storage_settings,
            callbacks=[
                failure_callback(
                    remote_context.reporter,
                    lambda is_preemption: ray.get(control.count_failure.remote(is_preemption)),
                )
            ],
            failure_config=FailureConfig(
                max_failures=max_failures,  # Ray Train does not count preemptions, as count_failure does not
                controller_failure_limit=max_controller_failures(config),  # type: ignore[call-arg]
            ),
        ),
    )


def trainer_class() -> Any:
    """Return Ray's TorchTrainer without the callbacks that start a process and are not needed."""
    from ray.train.torch import TorchTrainer

    omitted = UNUSED_CALLBACKS if cluster.is_private() else UNUSED_CALLBACKS[:1]

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()  # type: ignore[misc]
            return [callback for callback in callbacks if type(callback).__name__ not in omitted]

    return Trainer


def train_or_load(
    train_worker: TrainWorker,
    arguments: Mapping[str, Any],
    config: TrainConfig,
    *,
    network: torch.nn.Module,
    context: StageContext,
) -> list[dict[str, Any]]:
    """Train unless a checkpoint of the last step exists; load its weights into `network` and return the curves.

    With an EMA these are the averaged weights. Raises UserError if training ends before the last step, if the storage
    does not work, or if the checkpoint does not match the network.
    """
    if context.storage:
        context.storage.check()
    checkpoints = Checkpoints.for_stage(context, config.keep_checkpoints)
    checkpoints.sync()
    state = checkpoints.latest()
    if state is None or state.step < config.steps:
        fit(train_worker, arguments, context=context)
        checkpoints.sync()
        state = checkpoints.latest()
    if state is None or state.step < config.steps:
        raise UserError(
            f"Training ended at step {state.step if state else 0} of {config.steps}.",
            where=context.work_dir,
            fix="Run the same command again; it continues from the newest checkpoint.",
        )
    try:
        network.load_state_dict(trained_weights(state.tensors, config))
    except RuntimeError as error:
        raise checkpoints.mismatch_error(state.step, "its weights have other names or shapes") from error
    return state.history


@contextmanager
def _ray_storage(context: StageContext) -> Iterator[dict[str, Any]]:
    """Yield RunConfig's storage settings: a folder that all nodes reach, removed when the block ends."""
    if context.storage is None:
        folder = context.work_dir / "ray"
        try:
            yield {"storage_path": str(folder)}
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    files, path = context.storage.child("ray").filesystem()
    try:
        yield {"storage_path": path, "storage_filesystem": PyFileSystem(FSSpecHandler(files))}
    finally:
        with suppress(Exception):  # a few hundred bytes are not worth failing a finished training for
            files.rm(path, recursive=True)


def _wait_or_stop(training: Future[Any], control: Any, check: Callable[[], None] = lambda: None) -> None:
    """Wait for training and call `check` meanwhile. If a signal interrupts, let the workers save, then raise it."""
    try:
        while not wait([training], CAPACITY_POLL_INTERVAL_S).done:
            check()
        training.result()
    except BaseException as error:
        if not training.done() and not isinstance(error, UserError):  # with the error of `check` there is no worker
            control.request_stop.remote()
            _wait_for_save(training, control)
        raise


def _wait_for_save(training: Future[Any], control: Any) -> None:
    """Wait until rank 0 has saved. Ray Train itself needs many seconds more to notice that the workers have ended."""
    import ray

    saved, deadline = control.wait_for_save.remote(), time.monotonic() + SAVE_TIMEOUT_S
    while time.monotonic() < deadline and not ray.wait([saved], timeout=0)[0]:
        if wait([training], SAVE_POLL_INTERVAL_S).done:
            return


def worker_main(config: dict[str, Any]) -> None:
    """Run `train_worker` in a process that Ray Train has started."""
    import ray.train
    import ray.train.torch
    import torch.distributed

    ray_context = ray.train.get_context()
    context: StageContext = config["context"]
    control = config["control"]
    is_rank_0 = ray_context.get_world_rank() == 0  # its clock counts for all
    arguments: dict[str, Any] = config["arguments"]
    torch.set_num_threads(max(1, int(context.cluster.cpus_per_worker)))
    parallel = ray_context.get_world_size() > 1
    marker_folder = context.work_dir  # remembers which injected faults have happened
    dist = DistributedContext(
        rank=ray_context.get_world_rank(),
        world_size=ray_context.get_world_size(),
        device=ray.train.torch.get_device(),
        all_reduce=torch.distributed.all_reduce if parallel else lambda tensor: None,
        start_all_reduce=start_all_reduce,
        wrap=wrap_ddp if parallel else lambda module: module,
        stop_requested=stop_requested(control),
        flops_per_image=context.flops_per_image,
        devices=ray_context.get_world_size() * min(1.0, context.cluster.gpus_per_worker or 1.0),
        checkpoint_timer=CheckpointTimer(60 * context.cluster.checkpoint_every_minutes if is_rank_0 else 0),
        inject_fault=lambda step: fault_injection.inject_faults(context.stage, dist.rank, step, marker_folder),
    )
    is_first = False  # of the ranks of its node; set with a storage
    if dist.rank > 0:  # only rank 0 reports
        context = replace(context, reporter=Reporter())
    elif not isinstance(context.cluster.workers, int):
        report_workers(dist.world_size, ray.get(control.set_workers.remote(dist.world_size)), context)
    # Ray Train restarts workers after any exception: a stop must not raise, and a UserError must end the restarts.
    with suppress(TrainingStopped), fail_without_retry(control), ExitStack() as stack:
        if context.storage:
            names, runtime = (context.stage, context.fingerprint[:16]), ray.get_runtime_context()
            marker_folder = node_cache_dir("faults", *names, f"rank-{dist.rank}")
            # One folder for all ranks of a node. Nodes may share a disk, and another checkout may train the same here.
            folder = node_cache_dir("checkpoints", *names) / f"{runtime.get_job_id()}-{runtime.get_node_id()}"
            context = replace(context, work_dir=folder)
            if is_first := is_first_on_node(runtime.get_node_id(), dist):
                stack.enter_context(claim_folder(folder))
            arguments = {
                name: value.fetch() if isinstance(value, StoredArtifact) else value for name, value in arguments.items()
            }
            fetch_same_checkpoint(Checkpoints.for_stage(context, keep=1), dist, is_first=is_first)
        try:
            config["train_worker"](dist=dist, context=context, **arguments)
        except TrainingStopped:
            if dist.rank == 0:  # the rank that saves
                ray.get(control.mark_saved.remote())
            raise
    if context.storage:
        shutil.rmtree(marker_folder, ignore_errors=True)
        if is_first:  # rank 0 is, and it alone still uses the folder
            shutil.rmtree(context.work_dir, ignore_errors=True)


def _resources(context: StageContext) -> dict[str, float]:
    resources = {"CPU": context.cluster.cpus_per_worker}
    if context.cluster.gpus_per_worker:
        resources["GPU"] = context.cluster.gpus_per_worker
    return resources
