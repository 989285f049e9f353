"""Do one thing to many parts side by side: a Ray Data map in which each worker keeps what it has built.

A part is a small dict of plain values (a shard's path, a range of samples). Workers write their own files, under
names that the part decides; so a rerun makes the same bytes, and finds finished parts finished.
"""

import io
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from stages.errors import UserError
from stages.runtime import cluster
from stages.runtime.run import Run

Part = dict[str, Any]
Result = dict[str, Any]  # arrays, and what JSON holds


def map_parts(
    worker: Callable[..., Callable[[Part], Result]],
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
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext

    if not parts:
        return []
    config = run.cluster
    weights = [part.get("weight", 1) for part in parts]
    results: list[Result] = [{}] * len(parts)
    with cluster.connected(config):
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        rows = [{"number": number, "part": json.dumps(dict(part))} for number, part in enumerate(parts)]
        mapped = ray.data.from_items(rows, override_num_blocks=len(parts)).map(
            _Call,  # type: ignore[arg-type]  # Ray builds the class in each process
            fn_constructor_args=(worker, arguments, max(1, int(config.cpus_per_worker))),
            compute=ActorPoolStrategy(min_size=1, max_size=min(config.workers, len(parts))),
            num_cpus=config.cpus_per_worker,
            num_gpus=config.gpus_per_worker or None,
        )
        done = 0
        run.reporter.progress(0, sum(weights), unit, {})
        try:
            for row in mapped.iter_rows():
                results[row["number"]] = unpacked(row["result"])
                done += weights[row["number"]]
                run.reporter.progress(done, sum(weights), unit, {})
        except ray.exceptions.RayError as error:
            raise _cause(error) from error
    return results


class _Call:
    """One process of the pool: a worker of its own, and its share of the CPUs."""

    def __init__(self, worker: Callable[..., Callable[[Part], Result]], arguments: tuple[Any, ...], threads: int):
        import torch

        torch.set_num_threads(threads)
        self.worker = worker(*arguments)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"number": row["number"], "result": packed(self.worker(json.loads(row["part"])))}


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


def _cause(error: BaseException) -> BaseException:
    """Find the error a worker raised beneath those that Ray wraps around it."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, UserError):
            return seen
        seen = getattr(seen, "cause", None) or seen.__cause__
    return error
