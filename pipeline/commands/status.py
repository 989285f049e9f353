"""`vqvae2 status`: the state of each stage, and why it is not up to date."""

import json

from pipeline import dvc, dvc_yaml, ownership, params, result_versions, stage_runner
from pipeline.drift import warn_drift
from stages.errors import UserError


def show(*, as_json: bool) -> int:
    """Print the state of each stage; return the exit status. Writes the result versions, which DVC compares.

    Raises UserError if DVC cannot compute its status and no stage is running.
    """
    data = params.read()
    settings = params.check(data)
    warn_drift()
    stages = dvc_yaml.stages(data)
    owners = {name: ownership.owner(stage_runner.RUNS / stage.cli_name) for name, stage in stages.items()}
    out_of_date: dict[str, list[str]] = {}
    dvc_is_busy = False
    result_versions.write(data, settings)
    try:
        out_of_date = dvc.out_of_date_reasons(stages)
    except UserError as error:
        if not error.what.startswith(ownership.BUSY) or not any(owners.values()):
            raise
        dvc_is_busy = True  # DVC locks its outputs while a stage runs
    rows = []
    for name, stage in stages.items():
        reasons: list[str] = []
        if owners[name]:
            state, reasons = "running", [owners[name]]
        elif dvc_is_busy:
            state, reasons = "unknown", ["DVC is busy"]
        elif name in out_of_date:
            state, reasons = "out of date", out_of_date[name]
        else:
            state = "up to date"
        if pinned := result_versions.describe_pinned(stage, settings):
            reasons = [*reasons, pinned]
        rows.append({"stage": stage.cli_name, "state": state, "reasons": reasons})
    if as_json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
    else:
        for row in rows:
            print(f"{row['stage']:<13} {row['state']:<11} {'; '.join(row['reasons'])}".rstrip())
    return 0
