"""Parallel map over the parts of a stage, by a pool of Ray Data actors.

A part is a small dict of plain values, such as a shard's path or a range of samples. Workers write their own files,
under names that the part determines, so a rerun writes the same bytes and skips finished parts. Without a shared disk,
remote_parts.py transfers inputs and outputs.
"""

import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from stages.cluster_config import ClusterConfig
from stages.errors import UserError, from_os_error
from stages.mapping.heartbeat import kill_stale_workers, start_heartbeat
from stages.mapping.remote_parts import NodeWorkspace, TransferPlan, part_digest
from stages.runtime import cluster, fault_injection
from stages.runtime.context import Reporter, StageContext, work_folder_name
from stages.runtime.control import start_control_actor
from stages.runtime.node_cache import node_cache_dir

Part = dict[str, Any]  # JSON values
Result = dict[str, Any]  # NumPy arrays and JSON values
PartMapper = Callable[..., Callable[[Part], Result]]  # class: built from arguments, then called with each part
RERUN_FIX = "Run the same command again; it regenerates the part."


def map_parts(
    mapper: PartMapper,
    arguments: tuple[Any, ...],
    parts: Sequence[Part],
    *,
    context: StageContext,
    unit: str,
) -> list[Result]:
    """Call `mapper(*arguments)(part)` for every part; return the results in the order of the parts.

    Each worker process builds its mapper once. Parts hold JSON values; results hold NumPy arrays and JSON values. Paths
    in either are absolute, because workers run in other folders and on other machines. A part with a key "weight"
    counts as that many of `unit` in the progress.

    Raises the UserError of a part, and UserError if workers were lost more than `cluster.max_failures` times.
    """
    if not parts:
        return []
    results: dict[int, Result] = {}
    weights = [part.get("weight", 1) for part in parts]
    done, total = 0, sum(weights)  # running, because a sum for each result would grow with the square of the parts

    def collect(number: int, result: Result) -> None:
        nonlocal done
        done += 0 if number in results else weights[number]
        results[number] = result
        context.reporter.progress(done, total, unit, {})

    with cluster.connect_cluster(context.cluster):
        context.reporter.progress(0, total, unit, {})
        plan = None
        if context.storage:
            context.storage.check()
            plan = TransferPlan.create(context, arguments, list(parts))
        if plan:
            finished_parts = plan.finished_parts()
            for number, part in enumerate(parts):
                digest = part_digest(part)
                if digest in finished_parts and (packed := plan.fetch_result(digest, context.work_dir)):
                    collect(number, unpack(packed))
        if len(results) < len(parts):
            control = start_control_actor()
            with kill_stale_workers(control, context.reporter.message):
                map_once = partial(
                    _map, mapper, arguments, context=context, plan=plan, control=control, collect=collect
                )
                _map_until_complete(map_once, dict(enumerate(parts)), results, context)
    return [results[number] for number in range(len(parts))]


def _map_until_complete(
    map_once: Callable[[dict[int, Part]], None],
    parts: Mapping[int, Part],
    results: Mapping[int, Result],
    context: StageContext,
    check_resources: Callable[[ClusterConfig], None] = cluster.check_resources,
) -> None:
    """Call `map_once` with the parts that have no result, and again after the loss of a worker.

    Raises UserError after more than `cluster.max_failures` losses, without those of preempted nodes.
    """
    max_failures, failures = context.cluster.max_failures, 0
    while True:
        missing = {number: part for number, part in parts.items() if number not in results}
        if not missing:
            return
        try:
            map_once(missing)
            return
        except cluster.lost_worker_errors() as error:
            failures += not getattr(error, "preempted", False)  # a preempted node is no failure
            if failures > max_failures:
                raise UserError(
                    f"Workers were lost {failures} times; cluster.max_failures is {max_failures}.",
                    where=context.work_dir,
                    fix="See that nodes stay up and have enough memory, then run the same command again; "
                    "it skips finished parts.",
                    code=3,
                ) from error
            context.reporter.message("A worker was lost; its unfinished parts run again.")
            # The lost node may have been the only one large enough.
            check_resources(replace(context.cluster, workers=1))


def _map(
    mapper: PartMapper,
    arguments: tuple[Any, ...],
    parts: dict[int, Part],
    *,
    context: StageContext,
    plan: TransferPlan | None,
    control: Any,
    collect: Callable[[int, Result], None],
) -> None:
    """Map the parts once, without retries, and pass every result to `collect` with the number of its part."""
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext
    from ray.util.annotations import RayDeprecationWarning

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    data_context = DataContext.get_current()
    data_context.enable_progress_bars = False
    data_context.print_on_execution_start = False
    rows = [{"number": number, "part": json.dumps(part)} for number, part in parts.items()]
    with warnings.catch_warnings():
        # `max_restarts` and `max_task_retries` are deprecated without a replacement. They are 0, because Ray's own
        # retries would hide the loss of a worker: it ends this map, and `_map_until_complete` repeats the map.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        mapped = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            _PartActor,  # type: ignore[arg-type]  # Ray builds the class in each process
            fn_constructor_args=(mapper, arguments, replace(context, reporter=Reporter()), plan, control),
            compute=ActorPoolStrategy(min_size=1, max_size=min(_most_actors(context, plan), len(rows))),
            max_restarts=0,
            max_task_retries=0,
            **_actor_options(context, plan),
        )
    for row in mapped.iter_rows():
        result = unpack(row["result"])
        if error := result.get("user_error"):
            raise UserError(**error)
        if plan:
            packed = plan.fetch_result(part_digest(parts[row["number"]]), context.work_dir)
            if packed is None:
                what = f"The stored output of part {row['number']} is damaged."
                raise UserError(what, where=plan.storage.url, fix=RERUN_FIX, code=5)
            result = unpack(packed)
        collect(row["number"], result)


def _most_actors(context: StageContext, plan: TransferPlan | None) -> int:
    if context.storage and plan is None:
        return context.cluster.min_workers  # all on this node, whatever the others have room for
    return cluster.workers_on_cluster(context.cluster)


def _actor_options(context: StageContext, plan: TransferPlan | None) -> dict[str, Any]:
    """Return Ray's options for the resources or the node of each worker."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if context.storage and plan is None:
        # Only this node has the inputs. It may have no CPUs in the cluster, so the workers reserve none.
        node_id = ray.get_runtime_context().get_node_id()
        return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False)}
    return {"num_cpus": context.cluster.cpus_per_worker, "num_gpus": context.cluster.gpus_per_worker or None}


class _PartActor:
    """Actor of the pool: builds a mapper once and calls it for each part."""

    def __init__(
        self,
        mapper: PartMapper,
        arguments: tuple[Any, ...],
        context: StageContext,
        plan: TransferPlan | None,
        control: Any,
    ):
        start_heartbeat(control)
        import torch

        torch.set_num_threads(max(1, int(context.cluster.cpus_per_worker)))
        self.stage = context.stage
        self.build_error: UserError | None = None
        try:
            self.workspace = NodeWorkspace(plan) if plan else None
            run_dir = ("runs", context.stage, work_folder_name(context.fingerprint))
            self.work_dir = node_cache_dir(*run_dir) if plan else context.work_dir
            self.mapper = mapper(*(self.workspace.localize_paths(arguments) if self.workspace else arguments))
        except UserError as error:  # Ray would take an error in the constructor for a lost worker
            self.build_error = error

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Map one row of `number` and `part`; return its number and the packed result or UserError."""
        part = json.loads(row["part"])
        try:
            if self.build_error:
                raise self.build_error
            fault_injection.inject_faults(self.stage, 0, int(row["number"]), self.work_dir)
            if self.workspace:
                packed = pack(self.mapper(self.workspace.localize_paths(part)))
                self.workspace.upload_result(part_digest(part), packed)
                result: Result = {}  # the result is in the storage
            else:
                result = self.mapper(part)
        except (UserError, OSError) as error:
            user_error = error if isinstance(error, UserError) else from_os_error(error, self.work_dir)
            if user_error is None:
                raise
            result = {"user_error": vars(user_error)}  # a value, because Ray adds tracebacks to raised errors
        return {"number": row["number"], "result": pack(result)}


def pack(result: Result) -> bytes:
    """Serialize a result without pickle, for the transfer between processes.

    Raises SafetensorError for an array of objects or text, and TypeError for other values that JSON does not have.
    """
    # Not as .npz: NumPy reads the header of an array by Python's parser, which fails at random when several threads of
    # Python 3.11 use it at once.
    arrays = {name: np.asarray(value, order="C") for name, value in result.items() if isinstance(value, np.ndarray)}
    json_values = {name: value for name, value in result.items() if name not in arrays}
    header = json.dumps({"values": json_values, "arrays": list(arrays)}).encode()
    return save(arrays | {"": np.frombuffer(header, np.uint8)})


def unpack(data: bytes) -> Result:
    """Deserialize a result written by `pack`."""
    arrays = load(data)
    header = json.loads(arrays[""].tobytes())
    return header["values"] | {name: arrays[name] for name in header["arrays"]}
