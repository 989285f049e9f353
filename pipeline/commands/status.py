"""`vqvae2 status`: each stage's state, and why it is not up to date."""

import json

from pipeline import dvc, dvc_yaml, ownership, params, params_header, stage_runner
from stages.errors import UserError


def show(*, as_json: bool) -> int:
    """Print the state of every stage."""
    params.load()
    params_header.warn_drift()
    stages = dvc_yaml.stages(params.read())
    owners = {name: ownership.owner(stage_runner.RUNS / stage.cli_name) for name, stage in stages.items()}
    trouble = ""
    try:
        why = dvc.reasons(stages)
    except UserError as error:
        if not any(owners.values()):
            raise
        why, trouble = {}, error.what  # DVC says nothing while it runs a stage
    rows = []
    for name, stage in stages.items():
        if owners[name]:
            state, reasons = "running", [owners[name]]
        elif trouble:
            state, reasons = "unknown", ["DVC is busy"]
        elif name in why:
            state, reasons = "out of date", why[name]
        else:
            state, reasons = "up to date", []
        rows.append({"stage": stage.cli_name, "state": state, "reasons": reasons})
    if as_json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
    else:
        for row in rows:
            print(f"{row['stage']:<13} {row['state']:<11} {'; '.join(row['reasons'])}".rstrip())
    return 0
