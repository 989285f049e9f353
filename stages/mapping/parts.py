"""Do one thing to many parts side by side: a Ray Data map in which each worker keeps what it has built.

A part is a small dict of plain values (a shard's path, a range of samples). Workers write their own files, under
names that the part decides; so a rerun makes the same bytes, and finds finished parts finished. Where nodes share no
disk, elsewhere.py carries inputs to the workers and files back.
"""

import io
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from stages.errors import UserError, from_os_error
from stages.mapping.heartbeat import kill_stale_workers, start_heartbeat
from stages.mapping.remote_parts import NodeWorkspace, TransferPlan, digest
from stages.runtime import cluster, fault_injection
from stages.runtime.context import Reporter, StageContext
from stages.runtime.control import start_control_actor
from stages.runtime.storage import node_folder

Part = dict[str, Any]
Worker = Callable[..., Callable[[Part], "Result"]]  # a class: built from arguments, called with a part
Result = dict[str, Any]  # arrays, and what JSON holds
AGAIN = "Run the same command again; it is made anew."


def map_parts(
    worker: Worker,
    arguments: tuple[Any, ...],
    parts: Sequence[Part],
    *,
    context: StageContext,
    unit: str,
) -> list[Result]:
    """Call `worker(*arguments)(part)` for every part; return the results in the order of the parts.

    Each process builds its worker once. Parts are JSON-able dicts, results dicts of NumPy arrays and JSON-able
    values; paths in either are absolute, since workers run in other folders and on other machines. A part with a key
    "weight" counts for that many of `unit` in the progress.
    """
    if not parts:
        return []
    results: dict[int, Result] = {}
    weights = [part.get("weight", 1) for part in parts]

    def collect(number: int, result: Result) -> None:
        results[number] = result
        context.reporter.progress(sum(weights[done] for done in results), sum(weights), unit, {})

    with cluster.connect_cluster(context.cluster):
        context.reporter.progress(0, sum(weights), unit, {})
        journey = None
        if context.storage:
            context.storage.check()
            journey = TransferPlan.planned(context, arguments, list(parts))
        if journey:
            finished = journey.finished()
            for number, part in enumerate(parts):
                if digest(part) in finished and (kept := journey.fetch(digest(part), context.work)):
                    collect(number, unpack(kept))
        _map_all(worker, arguments, dict(enumerate(parts)), results, context, journey, collect)
    return [results[number] for number in range(len(parts))]


def _map_all(
    worker: Worker,
    arguments: tuple[Any, ...],
    parts: dict[int, Part],
    results: dict[int, Result],
    context: StageContext,
    journey: TransferPlan | None,
    collect: Callable[[int, Result], None],
) -> None:
    """Map what has no result yet, and again what a lost worker had not finished."""
    if len(results) == len(parts):
        return
    desk = start_control_actor()
    with kill_stale_workers(desk, context.reporter.note):
        for failures in range(context.cluster.max_failures + 1):
            missing = {number: part for number, part in parts.items() if number not in results}
            try:
                if missing:
                    _map(worker, arguments, missing, context, journey, desk, collect)
                return
            except _lost() as error:
                if failures == context.cluster.max_failures:
                    raise UserError(
                        f"Workers were lost {failures + 1} times; cluster.max_failures is {failures}.",
                        where=context.work,
                        fix="See that nodes stay up and have memory enough, then run the same command again; "
                        "what is finished stays finished.",
                        code=3,
                    ) from error
                context.reporter.note("A worker was lost; what it had not finished is done again.")
                cluster.check(replace(context.cluster, workers=1))  # its node may have been the only one of its kind


def _lost() -> tuple[type[Exception], ...]:
    """Name what Ray raises where a worker or its node has ended."""
    from ray import exceptions

    return (
        exceptions.RayActorError,
        exceptions.ObjectLostError,
        exceptions.OutOfMemoryError,
        exceptions.NodeDiedError,
        exceptions.WorkerCrashedError,
    )


def _map(
    worker: Worker,
    arguments: tuple[Any, ...],
    parts: dict[int, Part],
    context: StageContext,
    journey: TransferPlan | None,
    desk: Any,
    collect: Callable[[int, Result], None],
) -> None:
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext
    from ray.util.annotations import RayDeprecationWarning

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    data_context = DataContext.get_current()
    data_context.enable_progress_bars = False
    data_context.print_on_execution_start = False
    rows = [{"number": number, "part": json.dumps(part)} for number, part in parts.items()]
    with warnings.catch_warnings():
        # Restarts have no other name yet. A lost worker ends the map, and `map_parts` repeats it for what is missing.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        mapped = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            _Call,  # type: ignore[arg-type]  # Ray builds the class in each process
            fn_constructor_args=(worker, arguments, replace(context, reporter=Reporter()), journey, desk),
            compute=ActorPoolStrategy(min_size=1, max_size=min(context.cluster.workers, len(rows))),
            max_restarts=0,
            max_task_retries=0,
            **_place(context, journey),
        )
    for row in mapped.iter_rows():
        result = unpack(row["result"])
        if error := result.get("user_error"):
            raise UserError(**error)
        if journey:
            kept = journey.fetch(digest(parts[row["number"]]), context.work)
            if kept is None:
                made = f"What part {row['number']} has made is damaged."
                raise UserError(made, where=journey.storage.url, fix=AGAIN, code=5)
            result = unpack(kept)
        collect(row["number"], result)


def _place(context: StageContext, journey: TransferPlan | None) -> dict[str, Any]:
    """Say what each process needs; this node itself, where there is something that it alone has."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if context.storage and journey is None:
        node = ray.get_runtime_context().get_node_id()
        return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}
    return {"num_cpus": context.cluster.cpus_per_worker, "num_gpus": context.cluster.gpus_per_worker or None}


class _Call:
    """One process of the pool: a worker of its own, and its share of the CPUs."""

    def __init__(
        self, worker: Worker, arguments: tuple[Any, ...], context: StageContext, journey: TransferPlan | None, desk: Any
    ):
        start_heartbeat(desk)
        import torch

        torch.set_num_threads(max(1, int(context.cluster.cpus_per_worker)))
        self.stage = context.stage
        self.refusal: UserError | None = None
        try:
            self.node = NodeWorkspace(journey) if journey else None
            self.work = node_folder("runs", context.stage, context.fingerprint[:16]) if journey else context.work
            self.worker = worker(*(self.node.localize_paths(arguments) if self.node else arguments))
        except UserError as error:  # raised here, it would be a lost worker to Ray
            self.refusal = error

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        part = json.loads(row["part"])
        try:
            if self.refusal:
                raise self.refusal
            fault_injection.at(self.stage, 0, int(row["number"]), self.work)
            if self.node:
                self.node.upload_result(digest(part), pack(self.worker(self.node.localize_paths(part))))
                result: Result = {}  # lies in the storage
            else:
                result = self.worker(part)
        except (UserError, OSError) as error:
            told = error if isinstance(error, UserError) else from_os_error(error, self.work)
            if told is None:
                raise
            result = {"user_error": vars(told)}  # an answer, not a failure: Ray would bury it in tracebacks
        return {"number": row["number"], "result": pack(result)}


def pack(result: Result) -> bytes:
    """Turn a result into bytes that hold no code, for the way between processes."""
    arrays = {name: value for name, value in result.items() if isinstance(value, np.ndarray)}
    rest = {name: value for name, value in result.items() if name not in arrays}
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays, **{"": np.frombuffer(json.dumps(rest).encode(), np.uint8)})
    return buffer.getvalue()


def unpack(data: bytes) -> Result:
    """Undo `packed`."""
    with np.load(io.BytesIO(data), allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    return json.loads(arrays.pop("").tobytes()) | arrays
