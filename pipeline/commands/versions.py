"""`vqvae2 versions`: the result version of each stage, and the table of known versions."""

import json
import os
from collections.abc import Mapping
from typing import Any

from pipeline import dvc_yaml, last_run, params, preflight, result_versions, shared_cluster, stage_source
from pipeline.commands import same_results
from pipeline.text import first_few
from stages.errors import UserError
from stages.formats.artifact import atomic_write


def run(*, write: bool, compare: str, new: bool, same_as: str, reason: str) -> int:
    """Print the versions, or write, compare or record them; return the exit status.

    Raises UserError if options contradict each other.
    """
    if sum(map(bool, (write, compare, new, same_as))) > 1:
        raise UserError(
            "--write, --compare, --new and --same-as exclude each other.",
            where="vqvae2 versions",
            fix="Use one of them.",
            code=2,
        )
    if write:
        preflight.check_quickly()
        data = params.read()
        result_versions.write(result_versions.compute(data, params.check(data)))
        _announce_changes(data)
        return 0
    if compare:
        different_files = same_results.compare(compare)
        print("\n".join(different_files) or "All results are equal.")
        return 1 if different_files else 0
    if new or same_as:
        return record(same_as=same_as, reason=reason)
    return show()


def _announce_changes(data: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> None:
    """Print and record what a run that plain DVC started changes. This is its first stage."""
    if "DVC_STAGE" not in environment or shared_cluster.FOLDER in environment:  # `vqvae2 run` has done so
        return
    if description := last_run.describe(last_run.since_last_run(data)):
        print(description, flush=True)
    last_run.record_run(data)


def show() -> int:
    """Print the result version of each stage, and the definitions that have changed since the table was written."""
    data = params.read()
    settings = params.check(data)
    for stage in dvc_yaml.stages(data).values():
        source = result_versions.source_of(stage, settings)
        text = source.version
        if not source.is_recorded:
            definitions = stage_source.changed_definitions(source.definitions)
            text += f"  not in the table; changed: {first_few(definitions, 5)}"
        if pinned := result_versions.describe_pinned(stage, settings):
            text += f"  {pinned}"
        print(f"{stage.cli_name:<13} {text}")
    return 0


def record(*, same_as: str, reason: str) -> int:
    """Record the source as it is now in the table, for every stage whose source has changed.

    The version of each is its hash. With `same_as`, a Git revision, it is the version that the stage has there, if the
    smoke pipeline has equal results at both. Raises UserError if a reason is missing, results differ, or the code is
    not that of a clone.
    """
    if not (stage_source.ROOT / ".git").exists():
        raise UserError(
            "The table of versions can only be written in a clone of the repository.",
            where=stage_source.TABLE,
            fix="Clone the repository and run the command there.",
            code=2,
        )
    if not reason:
        raise UserError(
            "--reason is missing.", where="vqvae2 versions", fix="State what changed in a sentence.", code=2
        )
    table = stage_source.read_table()
    sources = {key: stage_source.source_of_key(key) for key in stage_source.table_keys()}
    changed = [key for key, source in sources.items() if not source.is_recorded]
    new_versions = {key: sources[key].hash for key in changed}
    if same_as and changed:
        new_versions |= same_results.versions_at(same_as, changed)  # a new stage has a version of its own
        same_results.require_equal(same_as)
    for key in changed:
        entry = {"version": new_versions[key], "reason": reason}
        table["versions"].setdefault(key, {})[sources[key].hash] = entry
    definitions = {name: digest for source in sources.values() for name, digest in source.definitions.items()}
    table["definitions"] = dict(sorted(definitions.items()))
    with atomic_write(stage_source.TABLE) as path:
        path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return show()
