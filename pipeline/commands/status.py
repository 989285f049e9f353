"""`vqvae2 status`: the state of each stage, and why it is not up to date."""

import json

from pipeline import dvc, dvc_yaml, ownership, params, result_versions, stage_runner
from pipeline.drift import warn_drift
from stages.config import Params
from stages.errors import UserError


def show(*, as_json: bool) -> int:
    """Print the state of each stage; return the exit status.

    Raises UserError if DVC cannot compute its status and no stage is running.
    """
    data = params.read()
    settings = params.check(data)
    warn_drift()
    stages = dvc_yaml.stages(data)
    owners = {name: ownership.owner(stage_runner.RUNS / stage.cli_name) for name, stage in stages.items()}
    out_of_date: dict[str, list[str]] = {}
    dvc_is_busy = False
    try:
        result_versions.write(data, settings)
        out_of_date = dvc.out_of_date_reasons(stages)
    except UserError:
        if not any(owners.values()):
            raise
        dvc_is_busy = True  # it computes no status while it runs a stage
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
        if stage.cli_name in settings.keep_results:
            reasons = [*reasons, _describe_kept(stage, settings)]
        rows.append({"stage": stage.cli_name, "state": state, "reasons": reasons})
    if as_json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
    else:
        for row in rows:
            print(f"{row['stage']:<13} {row['state']:<11} {'; '.join(row['reasons'])}".rstrip())
    return 0


def _describe_kept(stage: dvc_yaml.Stage, settings: Params) -> str:
    recorded, current = result_versions.kept_version(stage), result_versions.code_of(stage, settings).version
    return f"kept at result version {recorded}" + (
        f"; this code computes version {current}" if current != recorded else ""
    )
