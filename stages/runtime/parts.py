"""Do one thing to many parts side by side: a Ray Data map in which each worker keeps what it has built.

A part is a small dict of plain values (a shard's path, a range of samples). Workers write their own files, under
names that the part decides; so a rerun makes the same bytes, and finds finished parts finished.
"""

import io
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from stages.errors import UserError
from stages.runtime import cluster
from stages.runtime.run import Run

Part = dict[str, Any]
Worker = Callable[..., Callable[[Part], "Result"]]  # a class: built from arguments, called with a part
Result = dict[str, Any]  # arrays, and what JSON holds


def map_parts(
    worker: Worker,
    arguments: tuple[Any, ...],
    parts: Sequence[Part],
    *,
    run: Run,
    unit: str,
) -> list[Result]:
    """Call `worker(*arguments)(part)` for every part; return the results in the order of the parts.

    Each process builds its worker once. Parts are JSON-able dicts, results dicts of NumPy arrays and JSON-able
    values; paths in either are absolute, since workers run in other folders and on other machines. A part with a key
    "weight" counts for that many of `unit` in the progress.
    """
    import ray

    if not parts:
        return []
    results: dict[int, Result] = {}
    weights = [part.get("weight", 1) for part in parts]

    def collect(number: int, result: Result) -> None:
        results[number] = result
        run.reporter.progress(sum(weights[done] for done in results), sum(weights), unit, {})

    with cluster.connected(run.cluster):
        run.reporter.progress(0, sum(weights), unit, {})
        for failures in range(run.cluster.max_failures + 1):
            missing = {number: part for number, part in enumerate(parts) if number not in results}
            try:
                _map(worker, arguments, missing, run, collect)
                break
            except ray.exceptions.RayActorError:
                if failures == run.cluster.max_failures:
                    raise
                run.reporter.note("A worker was lost; what it had not finished is done again.")
    return [results[number] for number in range(len(parts))]


def _map(
    worker: Worker, arguments: tuple[Any, ...], parts: dict[int, Part], run: Run, collect: Callable[[int, Result], None]
) -> None:
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext
    from ray.util.annotations import RayDeprecationWarning

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    rows = [{"number": number, "part": json.dumps(part)} for number, part in parts.items()]
    with warnings.catch_warnings():
        # Restarts have no other name yet. A lost worker ends the map, and `map_parts` repeats it for what is missing.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        mapped = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            _Call,  # type: ignore[arg-type]  # Ray builds the class in each process
            fn_constructor_args=(worker, arguments, max(1, int(run.cluster.cpus_per_worker))),
            compute=ActorPoolStrategy(min_size=1, max_size=min(run.cluster.workers, len(rows))),
            num_cpus=run.cluster.cpus_per_worker,
            num_gpus=run.cluster.gpus_per_worker or None,
            max_restarts=0,
            max_task_retries=0,
        )
    for row in mapped.iter_rows():
        result = unpacked(row["result"])
        if error := result.get("user_error"):
            raise UserError(**error)
        collect(row["number"], result)


class _Call:
    """One process of the pool: a worker of its own, and its share of the CPUs."""

    def __init__(self, worker: Worker, arguments: tuple[Any, ...], threads: int):
        import torch

        torch.set_num_threads(threads)
        self.worker = worker(*arguments)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            result = self.worker(json.loads(row["part"]))
        except UserError as error:  # an answer, not a failure: Ray would bury it in tracebacks
            result = {"user_error": vars(error)}
        return {"number": row["number"], "result": packed(result)}


def packed(result: Result) -> bytes:
    """Turn a result into bytes that hold no code, for the way between processes."""
    arrays = {name: value for name, value in result.items() if isinstance(value, np.ndarray)}
    rest = {name: value for name, value in result.items() if name not in arrays}
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays, **{"": np.frombuffer(json.dumps(rest).encode(), np.uint8)})
    return buffer.getvalue()


def unpacked(data: bytes) -> Result:
    """Undo `packed`."""
    with np.load(io.BytesIO(data), allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    return json.loads(arrays.pop("").tobytes()) | arrays
