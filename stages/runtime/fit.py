"""Train on many machines: copies of one torch loop, started and watched by Ray Train.

The workers report through a queue to the process that started them, which alone talks to the terminal and to MLflow.
"""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.config import TrainConfig
from stages.errors import UserError
from stages.runtime import cluster
from stages.runtime.checkpoint import Checkpoints
from stages.runtime.loop import Stopped, Worker, under
from stages.runtime.run import Reporter, Run

STOP = "stop"  # a file of this name in the work folder asks the workers to save and end
REFUSAL = "refusal.json"  # and one of this name says why one of them gave up for good
POLL_SECONDS = 0.5
GRACE_SECONDS = 15.0  # a machine that is taken away gives 30 seconds, or 20


Learn = Callable[..., None]  # what each worker does, given worker, run and its arguments by name: it calls loop.train


def fit(learn: Learn, arguments: Mapping[str, Any], *, run: Run) -> None:
    """Run `learn(worker=, run=, **arguments)` on every worker, and return when all have finished.

    `learn` must be a function of a module, and `arguments` plain data with absolute paths: both travel to other
    machines, where the current folder is another. Raises what the first failed worker raised.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.queue import Queue

    config = run.cluster
    name = f"attempt-{time.time_ns()}"  # a name Ray has seen before would count as finished
    for old in (STOP, REFUSAL):
        (run.work / old).unlink(missing_ok=True)
    with cluster.connected(config):
        queue = Queue(actor_options={"num_cpus": 0})
        remote = Run(run.stage, run.fingerprint, run.work, config, QueueReporter(queue))
        trainer = TorchTrainer(
            _work,
            train_loop_config={"learn": learn, "arguments": dict(arguments), "run": remote},
            scaling_config=ScalingConfig(
                num_workers=config.workers,
                use_gpu=config.gpus_per_worker > 0,
                resources_per_worker=_resources(run),
            ),
            torch_config=TorchConfig(timeout_s=300),
            run_config=RunConfig(
                name=name,
                storage_path=str(run.work / "ray"),
                failure_config=FailureConfig(  # a controller that fails is retried without end unless told otherwise
                    max_failures=config.max_failures,
                    controller_failure_limit=3,  # type: ignore[call-arg]
                ),
            ),
        )
        try:
            with _forwarding(queue, run.reporter):
                _wait(_in_background(trainer.fit), run.work / STOP)
        except ray.train.WorkerGroupError as error:
            raise _root_cause(error.worker_failures.values()) from error
        except (ray.train.ControllerError, ray.exceptions.RayActorError) as error:  # the latter: its node is gone
            raise UserError(
                f"Training could not go on: {_last_line(error)}",
                where=run.work,
                fix="Run the same command again; it goes on from the newest checkpoint.",
                code=3,
            ) from error
        finally:
            shutil.rmtree(run.work / "ray", ignore_errors=True)
    if (run.work / STOP).exists():
        raise Stopped("training was asked to stop; its state is saved")


def trained(
    learn: Learn, arguments: Mapping[str, Any], config: TrainConfig, *, run: Run
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Train to the last step, or find that done; return the weights to keep, averaged if so asked, and the curves."""
    checkpoints = Checkpoints(run.work, run.fingerprint, config.keep_checkpoints, run.reporter.note)
    state = checkpoints.latest()
    if state is None or state.step < config.steps:
        fit(learn, arguments, run=run)
        state = checkpoints.latest()
    if state is None or state.step < config.steps:
        raise UserError(
            f"Training ended at step {state.step if state else 0} of {config.steps}.",
            where=run.work,
            fix="Run the same command again; it goes on from the newest checkpoint.",
        )
    prefix = "averaged.module." if config.averaging else "network."
    return dict(under(prefix, state.tensors)), state.history


class QueueReporter(Reporter):
    """Hands what a worker reports to the process that started the workers."""

    def __init__(self, queue: Any):
        self.queue = queue

    def progress(self, done: float, total: float, unit: str, numbers: Mapping[str, float]) -> None:
        self.queue.put(("progress", (done, total, unit, dict(numbers))))

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self.queue.put(("metrics", (dict(values), step)))

    def picture(self, name: str, png: bytes, step: int) -> None:
        self.queue.put(("picture", (name, png, step)))

    def note(self, text: str) -> None:
        self.queue.put(("note", (text,)))


@contextmanager
def _forwarding(queue: Any, reporter: Reporter) -> Iterator[None]:
    """Hand on what the workers report, until the block ends and the queue is empty."""
    from ray.exceptions import RayError

    ended = threading.Event()

    def forward() -> None:
        while True:
            last = ended.is_set()
            try:
                reports = queue.get_nowait_batch(queue.qsize())
            except RayError:  # the cluster is gone; training itself says so
                return
            for method, arguments in reports:
                getattr(reporter, method)(*arguments)
            if last:
                return
            ended.wait(POLL_SECONDS)

    thread = threading.Thread(target=forward, name="reports", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(GRACE_SECONDS)  # a cluster that is gone may never answer


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


def _wait(training: Future[Any], stop: Path) -> None:
    """Wait for training; when a signal interrupts, give the workers time to save, then let it through."""
    try:
        training.result()
    except BaseException:
        if not training.done():
            stop.touch()
            wait([training], GRACE_SECONDS)
        raise


def _work(config: dict[str, Any]) -> None:
    """Be one worker: what Ray Train calls in each process it starts."""
    import ray.train
    import ray.train.torch
    import torch.distributed

    context = ray.train.get_context()
    run: Run = config["run"]
    torch.set_num_threads(max(1, int(run.cluster.cpus_per_worker)))
    several = context.get_world_size() > 1
    worker = Worker(
        rank=context.get_world_rank(),
        count=context.get_world_size(),
        device=ray.train.torch.get_device(),
        reduce=torch.distributed.all_reduce if several else lambda tensor: None,
        wrap=_distributed if several else lambda module: module,
        stopping=(run.work / STOP).exists,
    )
    if worker.rank > 0:
        run = Run(run.stage, run.fingerprint, run.work, run.cluster)  # one voice is enough
    with suppress(Stopped), _refused_once(run.work / REFUSAL):  # to Ray a failure is a reason to begin again
        config["learn"](worker=worker, run=run, **config["arguments"])


@contextmanager
def _refused_once(refusal: Path) -> Iterator[None]:
    """Keep what only the user can mend, and raise it at once when Ray Train, which cannot tell, tries again."""
    if refusal.exists():
        what, where, fix, code = json.loads(refusal.read_text(encoding="utf-8"))
        raise UserError(what, where=where, fix=fix, code=code)
    try:
        yield
    except UserError as error:
        whole = refusal.with_suffix(f".{os.getpid()}")
        whole.write_text(json.dumps(error.args), encoding="utf-8")
        whole.replace(refusal)
        raise


def _distributed(module: torch.nn.Module) -> torch.nn.Module:
    # The codebooks are buffers that every worker moves the same way: nothing to broadcast.
    return torch.nn.parallel.DistributedDataParallel(module, broadcast_buffers=False)


def _resources(run: Run) -> dict[str, float]:
    resources = {"CPU": run.cluster.cpus_per_worker}
    if run.cluster.gpus_per_worker:
        resources["GPU"] = run.cluster.gpus_per_worker
    return resources


def _root_cause(failures: Any) -> BaseException:
    """Pick the error that is the user's to mend, or else the first: the others fell with it."""
    unwrapped = [_unwrapped(failure) for failure in failures]
    return next((failure for failure in unwrapped if isinstance(failure, UserError)), unwrapped[0])


def _unwrapped(error: BaseException) -> BaseException:
    while (cause := getattr(error, "cause", None) or getattr(error, "_base_exc", None)) is not None:
        error = cause
    return error


def _last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
