"""Train on many machines: copies of one torch loop, started and watched by Ray Train.

The workers report to the process that started them, which alone talks to the terminal and to MLflow. Where nodes share
no disk, the inputs and the checkpoints go through the storage, and each worker has a folder on its own node.
"""

import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from stages.config import TrainConfig
from stages.errors import UserError
from stages.runtime import cluster, fault_injection
from stages.runtime.context import Reporter, StageContext
from stages.runtime.control import RemoteReporter, fail_without_retry, forwarding, start_control_actor, stop_requested
from stages.runtime.storage import Storage, Stored, node_folder
from stages.training.checkpoint import Checkpoints
from stages.training.loop import CheckpointMismatch, Stopped, Worker, under

SAVE_TIMEOUT_S = 15.0  # a machine that is taken away gives 30 seconds, or 20
COLLECTIVE_TIMEOUT_S = 300  # after which a worker gives up waiting for the others
UPLOAD_TIMEOUT_S = 3600  # the same, where the others may wait for the first to bring a checkpoint to a slow store
INPUTS_TIMEOUT = timedelta(hours=12)  # how long workers wait for one that is still fetching its inputs


TrainWorker = Callable[
    ..., None
]  # what each worker does, given worker, run and its arguments by name: it calls loop.train


def fit(train_worker: TrainWorker, arguments: Mapping[str, Any], *, context: StageContext) -> None:
    """Run `learn(worker=, run=, **arguments)` on every worker, and return when all have finished.

    `learn` must be a function of a module, and `arguments` plain data with absolute paths: both travel to other
    machines, where the current folder is another. Raises what the first failed worker raised.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    config = context.cluster
    with cluster.connect_cluster(config), _ray_folder(context) as ray_place:
        if config.storage:
            storage = Storage(config.storage)
            arguments = {
                name: Stored.upload(value, storage) if isinstance(value, Path) else value
                for name, value in arguments.items()
            }
        desk = start_control_actor()
        remote = replace(context, reporter=RemoteReporter(desk))
        trainer = TorchTrainer(
            worker_main,
            train_loop_config={"learn": train_worker, "arguments": dict(arguments), "run": remote, "desk": desk},
            scaling_config=ScalingConfig(
                num_workers=config.workers,
                use_gpu=config.gpus_per_worker > 0,
                resources_per_worker=_resources(context),
            ),
            torch_config=TorchConfig(timeout_s=UPLOAD_TIMEOUT_S if config.storage else COLLECTIVE_TIMEOUT_S),
            run_config=RunConfig(
                name=f"attempt-{time.time_ns()}",  # a name Ray has seen before would count as finished
                **ray_place,
                callbacks=[_telling(remote.reporter)],
                failure_config=FailureConfig(  # a controller that fails is retried without end unless told otherwise
                    max_failures=config.max_failures,
                    controller_failure_limit=3,  # type: ignore[call-arg]
                ),
            ),
        )
        try:
            with forwarding(desk, context.reporter):
                _wait(_in_background(trainer.fit), desk)
        except ray.train.WorkerGroupError as error:
            rank, cause = _root_cause(error.worker_failures)
            if told := describe_failure(cause):
                times, place = config.max_failures, _place(error.worker_failures[rank])
                raise UserError(
                    f"Workers failed {times + 1} times; cluster.max_failures is {times}. Worker {rank}{place} {told}",
                    where=context.work,
                    fix="See that nodes stay up and have memory enough, then run the same command again; it goes on "
                    "from the newest checkpoint.",
                    code=3,
                ) from error
            if isinstance(cause, CheckpointMismatch):
                raise UserError(
                    str(cause),
                    where=context.work,
                    fix="Run the same command again. If the nodes share no disk, set cluster.storage first.",
                    code=3,
                ) from error
            raise cause from error
        except (ray.train.ControllerError, ray.exceptions.RayActorError) as error:  # the latter: its node is gone
            if "startup timed out" in str(error):
                cluster.check(config)  # a node may have left
            raise UserError(
                f"Training could not go on: {summarize_error(error)}",
                where=context.work,
                fix="Run the same command again; it goes on from the newest checkpoint.",
                code=3,
            ) from error


def train_or_load(
    train_worker: TrainWorker,
    arguments: Mapping[str, Any],
    config: TrainConfig,
    *,
    network: torch.nn.Module,
    context: StageContext,
) -> list[dict[str, Any]]:
    """Train to the last step, or find that done; load the weights, averaged if so asked, and return the curves."""
    if context.storage:
        context.storage.check()
    checkpoints = Checkpoints.of(context, config.keep_checkpoints)
    checkpoints.exchange()
    state = checkpoints.latest()
    if state is None or state.step < config.steps:
        fit(train_worker, arguments, context=context)
        checkpoints.exchange()
        state = checkpoints.latest()
    if state is None or state.step < config.steps:
        raise UserError(
            f"Training ended at step {state.step if state else 0} of {config.steps}.",
            where=context.work,
            fix="Run the same command again; it goes on from the newest checkpoint.",
        )
    prefix = "averaged.module." if config.ema_decay else "network."
    try:
        network.load_state_dict(dict(under(prefix, state.tensors)))
    except RuntimeError as error:
        raise checkpoints.unfit(state.step, "its weights have other names or shapes") from error
    return state.history


@contextmanager
def _ray_folder(context: StageContext) -> Iterator[dict[str, Any]]:
    """Give Ray Train a place that all nodes reach for what it notes down, for the length of the block."""
    if context.storage is None:
        folder = context.work / "ray"
        try:
            yield {"storage_path": str(folder)}
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    files, path = context.storage.under("ray").opened()
    try:
        yield {"storage_path": path, "storage_filesystem": PyFileSystem(FSSpecHandler(files))}
    finally:
        with suppress(Exception):  # a store that is away keeps a few hundred bytes too many
            files.rm(path, recursive=True)


def _in_background(call: Callable[[], Any]) -> Future[Any]:
    """Call in a thread that dies with the process, so that the main one stays free to hear signals."""
    future: Future[Any] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name="fit", daemon=True).start()
    return future


def _wait(training: Future[Any], desk: Any) -> None:
    """Wait for training; when a signal interrupts, give the workers time to save, then let it through."""
    try:
        training.result()
    except BaseException:
        if not training.done():
            desk.stop.remote()
            _until_saved(training, desk)
        raise


def _until_saved(training: Future[Any], desk: Any) -> None:
    """Wait no longer than the workers need: Ray Train takes many seconds more to find that they have ended."""
    import ray

    saved, end = desk.saving.remote(), time.monotonic() + SAVE_TIMEOUT_S
    while time.monotonic() < end and not ray.wait([saved], timeout=0)[0]:
        if wait([training], 0.1).done:
            return


def worker_main(config: dict[str, Any]) -> None:
    """Be one worker: what Ray Train calls in each process it starts."""
    import ray.train
    import ray.train.torch
    import torch.distributed

    ray_context = ray.train.get_context()
    context: StageContext = config["run"]
    arguments: dict[str, Any] = config["arguments"]
    torch.set_num_threads(max(1, int(context.cluster.cpus_per_worker)))
    several = ray_context.get_world_size() > 1
    marks = context.work  # where a fault that has come leaves a marker
    worker = Worker(
        rank=ray_context.get_world_rank(),
        count=ray_context.get_world_size(),
        device=ray.train.torch.get_device(),
        reduce=torch.distributed.all_reduce if several else lambda tensor: None,
        wrap=_distributed if several else lambda module: module,
        stopping=stop_requested(config["desk"]),
        fault=lambda step: fault_injection.at(context.stage, worker.rank, step, marks),
    )
    if worker.rank > 0:
        context = StageContext(context.stage, context.fingerprint, context.work, context.cluster)  # one voice is enough
    with suppress(Stopped), fail_without_retry(config["desk"]):  # to Ray a failure is a reason to begin again
        if context.storage:
            job = ray.get_runtime_context().get_job_id()  # another checkout may be making the same here
            context = replace(
                context, work=node_folder(f"rank-{worker.rank}", context.stage, context.fingerprint[:16], job)
            )
            marks = context.work.parent
            arguments = {
                name: value.fetch() if isinstance(value, Stored) else value for name, value in arguments.items()
            }
            _begin_together(Checkpoints.of(context, keep=1), worker)
        try:
            config["learn"](worker=worker, context=context, **arguments)
        except Stopped:
            if worker.rank == 0:  # which saves
                ray.get(config["desk"].saved.remote())
            raise
    if context.storage:
        shutil.rmtree(marks, ignore_errors=True)  # with what killed jobs have left


def _begin_together(checkpoints: Checkpoints, worker: Worker) -> None:
    """Let all workers go on from the checkpoint that the first one chooses, since another may be arriving."""
    import torch.distributed

    step = torch.tensor([checkpoints.fetch() if worker.rank == 0 else 0])
    if worker.count > 1:
        patient = torch.distributed.new_group(backend="gloo", timeout=INPUTS_TIMEOUT)
        torch.distributed.broadcast(step, 0, group=patient)
        if worker.rank > 0 and step:
            checkpoints.fetch_step(int(step))
        torch.distributed.barrier(group=patient)
    checkpoints.forget_all_but(int(step))


def _distributed(module: torch.nn.Module) -> torch.nn.Module:
    # The codebooks are buffers that every worker moves the same way: nothing to broadcast.
    return torch.nn.parallel.DistributedDataParallel(module, broadcast_buffers=False)


def _resources(context: StageContext) -> dict[str, float]:
    resources = {"CPU": context.cluster.cpus_per_worker}
    if context.cluster.gpus_per_worker:
        resources["GPU"] = context.cluster.gpus_per_worker
    return resources


def _telling(reporter: Reporter) -> Any:
    """Have Ray Train say why workers begin again."""
    from ray.train import UserCallback

    class ErrorCapturingDataset(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, BaseException]) -> None:
            rank, cause = _root_cause(worker_exceptions)
            if not isinstance(cause, UserError):  # which ends training
                told = describe_failure(cause) or f"raised {type(cause).__name__}: {summarize_error(cause)}"
                reporter.note(f"Worker {rank}{_place(worker_exceptions[rank])} {told}")

    return ErrorCapturingDataset()


def _root_cause(failures: Mapping[int, BaseException]) -> tuple[int, BaseException]:
    """Pick the worker that failed first, and its error: what is the user's to mend, or else what ended the worker.

    The others fell with it: their sums found nobody there.
    """

    def followed(failure: tuple[int, BaseException]) -> int:
        error = failure[1]
        if isinstance(error, UserError):
            return 0
        return 3 if is_peer_failure(error) else 1 if describe_failure(error) else 2

    return min(((rank, _unwrapped(failures[rank])) for rank in sorted(failures)), key=followed)


def describe_failure(error: BaseException) -> str:
    """Say in what way a worker was lost; "" if it raised an error of its own."""
    name = type(error).__name__
    if is_peer_failure(error):
        return "lost touch with another."
    if not type(error).__module__.startswith("ray."):
        return ""
    if "OutOfMemory" in name:
        return "was lost: its node had no memory left."
    return "was lost: " + ("it no longer answered." if "Timeout" in name else "its process or its node ended.")


def is_peer_failure(error: BaseException) -> bool:
    """Say whether a sum found somebody missing."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def _place(failure: BaseException) -> str:
    """Name the node of a worker, where Ray Train's own account of its end does."""
    found = re.search(r"node_ip='([^']+)'", str(failure))
    return f" on {found[1]}" if found else ""


def _unwrapped(error: BaseException) -> BaseException:
    inside = ("cause", "_base_exc", "health_check_failure")
    while (cause := next(filter(None, (getattr(error, name, None) for name in inside)), None)) is not None:
        error = cause
    return error


def summarize_error(error: BaseException) -> str:
    import ray

    cause = getattr(error, "controller_failure", error)
    if isinstance(cause, ray.exceptions.RayActorError):  # it quotes what its own protocol says
        return "the Ray cluster ended, or the node that led training did."
    return str(cause).strip().splitlines()[-1] if str(cause).strip() else type(cause).__name__
