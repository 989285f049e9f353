"""Result version of every stage, written to the file that DVC watches in place of source files.

The stage `result_versions` of dvc.yaml runs each time and writes this file. The other stages list their own key of it
among their parameters, so plain `dvc repro` reruns a stage when the source that determines its result has changed.
The version of `evaluate` also has a hash of the files that evaluate.networks names.
`keep_results` in params.yaml pins a stage to the version that dvc.lock records.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.config import plain_settings
from pipeline import dvc_yaml, params, stage_source
from pipeline.sections import sections_of
from pipeline.stage_source import StageSource
from pipeline.text import first_few
from stages.config import INSTALLED, Params
from stages.errors import UserError
from stages.formats.artifact import atomic_write
from stages.formats.flatten import flatten
from stages.metrics.networks import read_networks

FILE = Path("result_versions.yaml")
FILES_DIGITS = 8  # hexadecimal digits of the hash of the feature networks' files in a version


def source_of(stage: dvc_yaml.Stage, settings: Params) -> StageSource:
    """Hash the source that determines a stage's result."""
    network = settings.priors[stage.key].network.name if stage.module == "prior" else ""
    return stage_source.source_of(stage.module, network)


def current_version(stage: dvc_yaml.Stage, settings: Params) -> str:
    """Return the version of what a stage computes now: of its source, and of the feature networks' files.

    DVC cannot depend on files that settings name. So their digests are part of the version, after a plus sign.
    """
    version = source_of(stage, settings).version
    files = {
        network.name: network.digest
        for network in read_networks(settings.evaluate.networks if "evaluate" in stage.params else {})
        if network.weights != INSTALLED
    }
    return f"{version}+{hashlib.sha256(json.dumps(files).encode()).hexdigest()[:FILES_DIGITS]}" if files else version


def version_of(stage: dvc_yaml.Stage, settings: Params) -> str:
    """Return the version of a stage's result: the current one, or the one that keep_results pins it to.

    Raises UserError if a pinned stage has no finished result.
    """
    return pinned_version(stage) if is_pinned(stage, settings) else current_version(stage, settings)


def describe_change(recorded: object, now: object) -> str:
    """Describe in a sentence why the version of a stage's result is another one."""
    if str(recorded).partition("+")[0] == str(now).partition("+")[0]:
        return "a file of evaluate.networks changed"
    return "the code that determines its result changed"


def is_pinned(stage: dvc_yaml.Stage, settings: Params) -> bool:
    """Return whether keep_results names a stage."""
    return stage.cli_name in map(dvc_yaml.cli_name, settings.keep_results)


def compute(data: Mapping[str, Any], settings: Params) -> dict[str, str]:
    """Return the version of every stage by command-line name. `data` is params.yaml as read.

    Raises UserError if keep_results names no stage, or a stage without a finished result, or one whose settings have
    changed.
    """
    stages = dvc_yaml.stages(data)
    _require_stages(settings, stages)
    versions: dict[str, str] = {}
    for stage in stages.values():
        version = version_of(stage, settings)
        if is_pinned(stage, settings) and version != current_version(stage, settings):
            _require_recorded_settings(stage, data, settings)
        versions[stage.cli_name] = version
    return versions


def write(versions: Mapping[str, str]) -> None:
    """Write the versions of all stages to FILE."""
    contents = "# Result version of each stage's source. Written by `vqvae2 versions --write`.\n"
    # Quoted: YAML reads a hash such as 12e4567890123456 as a number.
    contents += "".join(f'{name}: "{version}"\n' for name, version in versions.items())
    if not FILE.is_file() or FILE.read_text(encoding="utf-8") != contents:
        FILE.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(FILE) as path:
            path.write_text(contents, encoding="utf-8")


def pinned_version(stage: dvc_yaml.Stage) -> str:
    """Return the version of a stage's finished result as dvc.lock records it.

    Raises UserError if there is no finished result.
    """
    version = _recorded_params(stage, FILE).get(stage.cli_name)
    if version is None:
        raise UserError(
            f"keep_results names {stage.cli_name}, which has no finished result to keep.",
            where=params.FILE,
            fix=f"Remove {stage.cli_name} from keep_results.",
            code=2,
        )
    return version


def describe_pinned(stage: dvc_yaml.Stage, settings: Params) -> str:
    """Describe the result that keep_results pins; "" if it does not name the stage."""
    if not is_pinned(stage, settings):
        return ""
    pinned, current = pinned_version(stage), current_version(stage, settings)
    return f"kept at result version {pinned}" + (f"; this code computes {current}" if current != pinned else "")


def require_not_pinned(stage: dvc_yaml.Stage, settings: Params) -> None:
    """Raise UserError if a stage is to run while keep_results pins it to a version that this code does not compute."""
    if not is_pinned(stage, settings):
        return
    pinned, current = pinned_version(stage), current_version(stage, settings)
    if pinned != current:
        raise UserError(
            f"{stage.cli_name} cannot run: keep_results keeps its result of version {pinned}, and this code computes "
            f"version {current}.",
            where=params.FILE,
            fix=f"To compute version {current}, remove {stage.cli_name} from keep_results. To keep the result, restore "
            "the settings and inputs it was computed from, then run: dvc checkout",
            code=2,
        )


def _require_stages(settings: Params, stages: Mapping[str, dvc_yaml.Stage]) -> None:
    names = [stage.cli_name for stage in stages.values()]
    for name in settings.keep_results:
        if dvc_yaml.cli_name(name) not in names:
            raise UserError(
                f"keep_results names {name!r}, which is not a stage.",
                where=params.FILE,
                fix=f"Use any of: {', '.join(names)}",
                code=2,
            )


def _require_recorded_settings(stage: dvc_yaml.Stage, data: Mapping[str, Any], settings: Params) -> None:
    """Refuse changed settings of a pinned stage before DVC deletes its result.

    A setting that a later release has added is no change at its neutral value.
    """
    recorded_params = _recorded_params(stage, params.FILE)
    changes: list[str] = []
    for key, section in sections_of(stage, settings).items():
        recorded, decisive = (flatten(values, key) for values in (recorded_params.get(key), plain_settings(section)))
        current = {
            name: value
            for name, value in flatten(params.look_up(data, key), key).items()
            if name in recorded or name in decisive
        }
        changes += params.changes(recorded, current)
    if changes:
        raise UserError(
            f"{stage.cli_name} is in keep_results and cannot run, but its settings changed: {first_few(changes)}.",
            where=params.FILE,
            fix=f"Restore these settings, or remove {stage.cli_name} from keep_results.",
            code=2,
        )


def _recorded_params(stage: dvc_yaml.Stage, file: Path) -> Mapping[str, Any]:
    return dvc_yaml.read_lock().get(stage.name, {}).get("params", {}).get(file.as_posix(), {})
