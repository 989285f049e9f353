"""Result version of every stage, written to the file that DVC watches in place of source files.

dvc.yaml has a stage that runs each time and writes this file. The other stages list their own key of it
among their parameters, so plain `dvc repro` reruns a stage exactly when the code that decides its result has changed.
`keep_results` in params.yaml holds a stage at the version that dvc.lock records.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline import code_version, dvc_yaml, params
from pipeline.code_version import Code
from pipeline.text import first_few
from stages.config import Params
from stages.errors import UserError
from stages.formats.artifact import atomic_write
from stages.formats.flatten import flatten

FILE = Path("artifacts/result_versions.yaml")
LOCK = Path("dvc.lock")
Version = int | str


def code_of(stage: dvc_yaml.Stage, settings: Params) -> Code:
    """Hash the code that decides a stage's result."""
    network = settings.priors[stage.level].network.name if stage.level else ""
    return code_version.code_of(stage.module, network)


def version_of(stage: dvc_yaml.Stage, settings: Params) -> Version:
    """Return the version of a stage's result: of the code, or the one that keep_results holds it at."""
    if stage.cli_name in settings.keep_results:
        return kept_version(stage)
    return code_of(stage, settings).version


def write(data: Mapping[str, Any], settings: Params) -> dict[str, Version]:
    """Write the version of every stage to FILE and return them by command-line name.

    `data` is params.yaml as read. Raises UserError if a kept stage has no result, or would have to run.
    """
    stages = dvc_yaml.stages(data)
    require_known(settings, stages)
    versions: dict[str, Version] = {}
    for stage in stages.values():
        versions[stage.cli_name] = version = code_of(stage, settings).version
        if stage.cli_name in settings.keep_results:
            versions[stage.cli_name] = kept_version(stage)
            if versions[stage.cli_name] != version:
                _require_same_settings(stage, data)
    contents = "# Result version of each stage's code. Written by `vqvae2 versions --write`.\n"
    contents += "".join(f"{name}: {_to_yaml(version)}\n" for name, version in versions.items())
    if not FILE.is_file() or FILE.read_text(encoding="utf-8") != contents:
        FILE.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(FILE) as path:
            path.write_text(contents, encoding="utf-8")
    return versions


def require_known(settings: Params, stages: Mapping[str, dvc_yaml.Stage]) -> None:
    """Raise UserError if keep_results names something that is not a stage."""
    names = [stage.cli_name for stage in stages.values()]
    for name in settings.keep_results:
        if name not in names:
            raise UserError(
                f"keep_results names {name!r}, which is not a stage.",
                where=params.FILE,
                fix=f"Use any of: {', '.join(names)}",
                code=2,
            )


def kept_version(stage: dvc_yaml.Stage) -> Version:
    """Return the version of a stage's finished result as dvc.lock records it.

    Raises UserError if there is no finished result.
    """
    recorded = locked(stage).get("params", {}).get(FILE.as_posix(), {}).get(stage.cli_name)
    if recorded is None:
        raise UserError(
            f"keep_results names {stage.cli_name}, which has no finished result to keep.",
            where=params.FILE,
            fix=f"Remove {stage.cli_name} from keep_results.",
            code=2,
        )
    return recorded


def refuse_kept(stage: dvc_yaml.Stage, settings: Params) -> None:
    """Raise UserError if a stage is to run while keep_results holds it at a version that this code does not compute."""
    if stage.cli_name not in settings.keep_results:
        return
    recorded, current = kept_version(stage), code_of(stage, settings).version
    if recorded != current:
        raise UserError(
            f"{stage.cli_name} cannot run: keep_results holds its result at version {recorded}, and this code computes "
            f"version {current}.",
            where=params.FILE,
            fix=f"To compute version {current}, remove {stage.cli_name} from keep_results. To keep the result, restore "
            "the inputs and settings it was computed from, then run: dvc checkout",
            code=2,
        )


def _require_same_settings(stage: dvc_yaml.Stage, data: Mapping[str, Any]) -> None:
    """Refuse changed settings of a kept stage before DVC deletes the kept result."""
    recorded = locked(stage).get("params", {}).get(params.FILE.name, {})
    changes = [
        change
        for key in stage.params
        for change in params.changes(flatten(recorded.get(key), key), flatten(_look_up(data, key), key))
    ]
    if changes:
        raise UserError(
            f"{stage.cli_name} is in keep_results and cannot run, but its settings changed: {first_few(changes)}.",
            where=params.FILE,
            fix=f"Restore these settings, or remove {stage.cli_name} from keep_results.",
            code=2,
        )


def locked(stage: dvc_yaml.Stage) -> Mapping[str, Any]:
    """Read a stage's entry of dvc.lock; an empty mapping if it has none."""
    if not LOCK.is_file():
        return {}
    return dict(params.read(LOCK).get("stages", {}).get(stage.name, {}))


def _look_up(data: Mapping[str, Any], key: str) -> Any:
    value: Any = data
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _to_yaml(version: Version) -> str:
    return str(version) if isinstance(version, int) else f'"{version}"'
