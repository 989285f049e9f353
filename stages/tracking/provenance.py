"""Facts of the run that computed a result: command, commit, date, duration, machine, and compute such as device-hours.

The facts differ between runs of equal settings, so they are not part of an artifact. Each stage records its own in its
work folder. `evaluate` also writes those of all stages before it to a script, which the report page loads. The copy of
the report for MLflow contains them.

    runs/STAGE/FINGERPRINT/provenance.json   facts of one stage
    runs/evaluate/FINGERPRINT/provenance.js  facts of all stages of the report
    runs/evaluate/FINGERPRINT/report.html    the report with these facts
"""

import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from stages.formats import artifact
from stages.formats.html_page import PROVENANCE_SCRIPT
from stages.tracking import tags
from stages.tracking.journal import JOURNAL_FILE, read_records, redact_secrets
from stages.tracking.quantities import format_duration, format_number
from stages.tracking.tracker import PipelineRun

_FACTS = "provenance.json"
_REPORT = "report.html"
MISSING = "–"  # cell of a stage that trains nothing
# Facts of the stages before the report that its table shows.
_REQUIRED = {"artifact": str, "stage": str, "started": str, "seconds": int | float, "machine": str}


def record_facts(
    stage: str,
    out: Path,
    work: Path,
    seconds: float,
    inputs: Iterable[str],
    parent: str | PipelineRun,
    choices: str,
    compute: Mapping[str, Any],
) -> None:
    """Record the facts of a stage that has written the artifact `out`. Its last attempt took `seconds`.

    `inputs` are the digests of its inputs. `parent` is the folder of the pipeline run, or describes a run without a
    folder. `choices` are the preset and the overrides of the settings. `compute` has the "device", the number of
    "devices", and for a training "images", "flop" and settings: see COMPUTE_COLUMNS. Credentials in URLs are masked.
    """
    facts = redact_secrets(
        {
            "stage": stage,
            "artifact": artifact.sha256(out / artifact.MANIFEST),
            "started": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(time.time() - seconds)),
            "seconds": round(seconds),
            "machine": _machine(),
            "commit": _commit(),
            "command": _command(parent),
            "run": parent.key() if isinstance(parent, PipelineRun) else Path(parent).name,
            "choices": choices,
            "compute": {**compute, "seconds": round(_earlier_seconds(work) + seconds)},
        }
    )
    _write(work / _FACTS, json.dumps(facts, indent=1, ensure_ascii=False))
    if (out / _REPORT).is_file():
        earlier = _facts_of(work.parents[1], set(inputs))
        provenance = {**_table(facts, earlier), "compute": _compute_table([*earlier, facts])}
        text = json.dumps(provenance, ensure_ascii=False).replace("<", "\\u003c")
        _write(work / PROVENANCE_SCRIPT, f"window.provenance = {text};\n")
        page = (out / _REPORT).read_text(encoding="utf-8")
        data = f'<script type="application/json" id="provenance">{text}</script>'
        _write(work / _REPORT, re.sub(r'<script src="[^"]*"></script>', lambda match: data, page, count=1))


def report_copy(work: Path) -> Path:
    """Return the path of the report that holds the facts of its run."""
    return work / _REPORT


def _facts_of(runs: Path, digests: set[str]) -> list[dict[str, Any]]:
    """Read the facts of the runs that wrote these artifacts, as far as they were computed in this folder.

    Those that are damaged or of another version are left out.
    """
    all_facts = []
    for path in sorted(runs.glob(f"*/*/{_FACTS}")):
        try:
            facts = json.loads(path.read_bytes())
            is_valid = all(isinstance(facts[name], value_type) for name, value_type in _REQUIRED.items())
            if is_valid and facts["artifact"] in digests:
                all_facts.append(redact_secrets(facts))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return sorted(all_facts, key=lambda facts: str(facts["started"]))


def _table(facts: Mapping[str, Any], earlier: list[dict[str, Any]]) -> dict[str, str]:
    """Format the facts of a report: label -> text. Empty facts are left out."""
    stages = [*earlier, facts]
    durations = [f"{stage['stage']} {format_duration(stage['seconds'])} ({stage['started']})" for stage in stages]
    machines = dict.fromkeys(stage["machine"] for stage in stages)
    table = {
        "Preset and overrides": facts["choices"],
        "Command": facts["command"],
        "Commit": facts["commit"],
        "Date": facts["started"],
        "Duration": f"{format_duration(sum(stage['seconds'] for stage in stages))}: {', '.join(durations)}",
        "Machine": "; ".join(machines),
        "Search in MLflow": f"tags.`{tags.KEY}` = '{facts['run']}'" if facts["run"] else "",
    }
    return {label: text for label, text in table.items() if text}


def _compute_table(stages: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Format the compute of stages: the header and the rows of a table. Damaged facts are left out."""
    rows = []
    for facts in stages:
        try:
            rows.append([facts["stage"], *(cell(facts["compute"]) for cell in COMPUTE_COLUMNS.values())])
        except (KeyError, TypeError, ValueError):
            continue
    return {"header": ["stage", *COMPUTE_COLUMNS], "rows": rows}


def _optional(name: str, text: Callable[[Any], str] = str) -> Callable[[Mapping[str, Any]], str]:
    return lambda compute: text(compute[name]) if name in compute else MISSING


# Heading and cell of each column.
COMPUTE_COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "device": lambda compute: str(compute["device"]),
    "devices": lambda compute: format_number(compute["devices"]),
    "device-hours": lambda compute: format_number(compute["seconds"] * compute["devices"] / 3600, 3),
    "images seen": _optional("images", lambda images: f"{images:,}"),
    "training TFLOP": _optional("flop", lambda flop: format_number(flop / 1e12, 3)),
    "batch size": _optional("batch_size"),
    "learning rate": _optional("learning_rate"),
    "augmentation": _optional("augmentation"),
}


def _earlier_seconds(work: Path) -> float:
    """Return the duration of the attempts before this one, from their journals: each ends at its last record."""
    spans: list[list[float]] = []  # begin and last record of each attempt
    for path in work.glob(f"tracked/*/{JOURNAL_FILE}"):
        is_first = True
        for record, _ in read_records(path):
            if record["kind"] == "begin" or is_first:
                spans.append([record["time"], record["time"]])
            is_first = False
            spans[-1][1] = record["time"]
    return sum(end - begin for begin, end in sorted(spans)[:-1])  # the last one is this attempt


def device_kind(*, has_gpu: bool) -> str:
    """Return the name of this machine's GPU, or "CPU"."""
    import torch

    return torch.cuda.get_device_name() if has_gpu and torch.cuda.is_available() else "CPU"


def _machine() -> str:
    parts = [platform.node(), f"{platform.system()} {platform.machine()}", f"{os.cpu_count()} processors"]
    import torch

    if torch.cuda.is_available():
        parts.append(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    return ", ".join(filter(None, parts))


def _commit() -> str:
    values = tags.code_tags()
    changed = ", with uncommitted changes" if values.get(tags.GIT_DIRTY) == "yes" else ""
    return f"{values[tags.GIT_COMMIT]}{changed}" if tags.GIT_COMMIT in values else ""


def _command(parent: str | PipelineRun) -> str:
    """Return the command that started a pipeline run; "" if it is unknown."""
    if isinstance(parent, PipelineRun):
        return parent.tags.get(tags.COMMAND, "")
    path = Path(parent, JOURNAL_FILE)
    for record, _ in read_records(path) if path.is_file() else ():
        if record["kind"] == "begin":
            return str(record["tags"].get(tags.COMMAND, ""))
    return ""


def _write(path: Path, text: str) -> None:
    with artifact.atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
