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
from stages.runtime import cluster, faults
from stages.runtime.checkpoint import Checkpoints
from stages.runtime.desk import DeskReporter, forwarding, hears_stop, open_desk, refused_once
from stages.runtime.loop import CheckpointMismatch, Stopped, Worker, under
from stages.runtime.run import Reporter, Run
from stages.runtime.storage import Storage, Stored, node_folder

GRACE_SECONDS = 15.0  # a machine that is taken away gives 30 seconds, or 20
COLLECTIVE_SECONDS = 300  # after which a worker gives up waiting for the others
UPLOAD_SECONDS = 3600  # the same, where the others may wait for the first to bring a checkpoint to a slow store
ARRIVAL = timedelta(hours=12)  # how long workers wait for one that is still fetching its inputs


Learn = Callable[..., None]  # what each worker does, given worker, run and its arguments by name: it calls loop.train


def fit(learn: Learn, arguments: Mapping[str, Any], *, run: Run) -> None:
    """Run `learn(worker=, run=, **arguments)` on every worker, and return when all have finished.

    `learn` must be a function of a module, and `arguments` plain data with absolute paths: both travel to other
    machines, where the current folder is another. Raises what the first failed worker raised.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    config = run.cluster
    with cluster.connected(config), _ray_folder(run) as ray_place:
        if config.storage:
            storage = Storage(config.storage)
            arguments = {
                name: Stored.upload(value, storage) if isinstance(value, Path) else value
                for name, value in arguments.items()
            }
        desk = open_desk()
        remote = replace(run, reporter=DeskReporter(desk))
        trainer = TorchTrainer(
            _work,
            train_loop_config={"learn": learn, "arguments": dict(arguments), "run": remote, "desk": desk},
            scaling_config=ScalingConfig(
                num_workers=config.workers,
                use_gpu=config.gpus_per_worker > 0,
                resources_per_worker=_resources(run),
            ),
            torch_config=TorchConfig(timeout_s=UPLOAD_SECONDS if config.storage else COLLECTIVE_SECONDS),
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
            with forwarding(desk, run.reporter):
                _wait(_in_background(trainer.fit), desk)
        except ray.train.WorkerGroupError as error:
            rank, cause = _root_cause(error.worker_failures)
            if told := _lost(cause):
                times, place = config.max_failures, _place(error.worker_failures[rank])
                raise UserError(
                    f"Workers failed {times + 1} times; cluster.max_failures is {times}. Worker {rank}{place} {told}",
                    where=run.work,
                    fix="See that nodes stay up and have memory enough, then run the same command again; it goes on "
                    "from the newest checkpoint.",
                    code=3,
                ) from error
            if isinstance(cause, CheckpointMismatch):
                raise UserError(
                    str(cause),
                    where=run.work,
                    fix="Run the same command again. If the nodes share no disk, set cluster.storage first.",
                    code=3,
                ) from error
            raise cause from error
        except (ray.train.ControllerError, ray.exceptions.RayActorError) as error:  # the latter: its node is gone
            if "startup timed out" in str(error):
                cluster.check(config)  # a node may have left
            raise UserError(
                f"Training could not go on: {_in_a_sentence(error)}",
                where=run.work,
                fix="Run the same command again; it goes on from the newest checkpoint.",
                code=3,
            ) from error


def trained(
    learn: Learn, arguments: Mapping[str, Any], config: TrainConfig, *, network: torch.nn.Module, run: Run
) -> list[dict[str, Any]]:
    """Train to the last step, or find that done; load the weights, averaged if so asked, and return the curves."""
    if run.storage:
        run.storage.check()
    checkpoints = Checkpoints.of(run, config.keep_checkpoints)
    checkpoints.exchange()
    state = checkpoints.latest()
    if state is None or state.step < config.steps:
        fit(learn, arguments, run=run)
        checkpoints.exchange()
        state = checkpoints.latest()
    if state is None or state.step < config.steps:
        raise UserError(
            f"Training ended at step {state.step if state else 0} of {config.steps}.",
            where=run.work,
            fix="Run the same command again; it goes on from the newest checkpoint.",
        )
    prefix = "averaged.module." if config.averaging else "network."
    try:
        network.load_state_dict(dict(under(prefix, state.tensors)))
    except RuntimeError as error:
        raise checkpoints.unfit(state.step, "its weights have other names or shapes") from error
    return state.history


@contextmanager
def _ray_folder(run: Run) -> Iterator[dict[str, Any]]:
    """Give Ray Train a place that all nodes reach for what it notes down, for the length of the block."""
    if run.storage is None:
        folder = run.work / "ray"
        try:
            yield {"storage_path": str(folder)}
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    files, path = run.storage.under("ray").opened()
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

    saved, end = desk.saving.remote(), time.monotonic() + GRACE_SECONDS
    while time.monotonic() < end and not ray.wait([saved], timeout=0)[0]:
        if wait([training], 0.1).done:
            return


def _work(config: dict[str, Any]) -> None:
    """Be one worker: what Ray Train calls in each process it starts."""
    import ray.train
    import ray.train.torch
    import torch.distributed

    context = ray.train.get_context()
    run: Run = config["run"]
    arguments: dict[str, Any] = config["arguments"]
    torch.set_num_threads(max(1, int(run.cluster.cpus_per_worker)))
    several = context.get_world_size() > 1
    marks = run.work  # where a fault that has come leaves a marker
    worker = Worker(
        rank=context.get_world_rank(),
        count=context.get_world_size(),
        device=ray.train.torch.get_device(),
        reduce=torch.distributed.all_reduce if several else lambda tensor: None,
        wrap=_distributed if several else lambda module: module,
        stopping=hears_stop(config["desk"]),
        fault=lambda step: faults.at(run.stage, worker.rank, step, marks),
    )
    if worker.rank > 0:
        run = Run(run.stage, run.fingerprint, run.work, run.cluster)  # one voice is enough
    with suppress(Stopped), refused_once(config["desk"]):  # to Ray a failure is a reason to begin again
        if run.storage:
            job = ray.get_runtime_context().get_job_id()  # another checkout may be making the same here
            run = replace(run, work=node_folder(f"rank-{worker.rank}", run.stage, run.fingerprint[:16], job))
            marks = run.work.parent
            arguments = {
                name: value.fetch() if isinstance(value, Stored) else value for name, value in arguments.items()
            }
            _begin_together(Checkpoints.of(run, keep=1), worker)
        try:
            config["learn"](worker=worker, run=run, **arguments)
        except Stopped:
            if worker.rank == 0:  # which saves
                ray.get(config["desk"].saved.remote())
            raise
    if run.storage:
        shutil.rmtree(marks, ignore_errors=True)  # with what killed jobs have left


def _begin_together(checkpoints: Checkpoints, worker: Worker) -> None:
    """Let all workers go on from the checkpoint that the first one chooses, since another may be arriving."""
    import torch.distributed

    step = torch.tensor([checkpoints.fetch() if worker.rank == 0 else 0])
    if worker.count > 1:
        patient = torch.distributed.new_group(backend="gloo", timeout=ARRIVAL)
        torch.distributed.broadcast(step, 0, group=patient)
        if worker.rank > 0 and step:
            checkpoints.fetch_step(int(step))
        torch.distributed.barrier(group=patient)
    checkpoints.forget_all_but(int(step))


def _distributed(module: torch.nn.Module) -> torch.nn.Module:
    # The codebooks are buffers that every worker moves the same way: nothing to broadcast.
    return torch.nn.parallel.DistributedDataParallel(module, broadcast_buffers=False)


def _resources(run: Run) -> dict[str, float]:
    resources = {"CPU": run.cluster.cpus_per_worker}
    if run.cluster.gpus_per_worker:
        resources["GPU"] = run.cluster.gpus_per_worker
    return resources


def _telling(reporter: Reporter) -> Any:
    """Have Ray Train say why workers begin again."""
    from ray.train import UserCallback

    class Telling(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, BaseException]) -> None:
            rank, cause = _root_cause(worker_exceptions)
            if not isinstance(cause, UserError):  # which ends training
                told = _lost(cause) or f"raised {type(cause).__name__}: {_in_a_sentence(cause)}"
                reporter.note(f"Worker {rank}{_place(worker_exceptions[rank])} {told}")

    return Telling()


def _root_cause(failures: Mapping[int, BaseException]) -> tuple[int, BaseException]:
    """Pick the worker that failed first, and its error: what is the user's to mend, or else what ended the worker.

    The others fell with it: their sums found nobody there.
    """

    def followed(failure: tuple[int, BaseException]) -> int:
        error = failure[1]
        if isinstance(error, UserError):
            return 0
        return 3 if _cut_off(error) else 1 if _lost(error) else 2

    return min(((rank, _unwrapped(failures[rank])) for rank in sorted(failures)), key=followed)


def _lost(error: BaseException) -> str:
    """Say in what way a worker was lost; "" if it raised an error of its own."""
    name = type(error).__name__
    if _cut_off(error):
        return "lost touch with another."
    if not type(error).__module__.startswith("ray."):
        return ""
    if "OutOfMemory" in name:
        return "was lost: its node had no memory left."
    return "was lost: " + ("it no longer answered." if "Timeout" in name else "its process or its node ended.")


def _cut_off(error: BaseException) -> bool:
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


def _in_a_sentence(error: BaseException) -> str:
    import ray

    cause = getattr(error, "controller_failure", error)
    if isinstance(cause, ray.exceptions.RayActorError):  # it quotes what its own protocol says
        return "the Ray cluster ended, or the node that led training did."
    return str(cause).strip().splitlines()[-1] if str(cause).strip() else type(cause).__name__
