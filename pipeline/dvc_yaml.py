"""Reader of dvc.yaml: the stages of the pipeline with their inputs and outputs, templates resolved as DVC does."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import params
from stages.errors import UserError
from stages.formats import artifact

FILE = Path("dvc.yaml")
LOCK = Path("dvc.lock")
ARTIFACTS = ("artifacts/*", "artifacts/priors/*", "artifacts/classifiers/*")  # glob patterns of the artifacts
PLOTS = "plots/"  # folder of the files that DVC draws
VERSIONS_STAGE = "result_versions"  # writes the result versions; the other stages depend on these, not on their code


@dataclass(frozen=True)
class Stage:
    """One stage of dvc.yaml, its templates resolved."""

    name: str  # in DVC, such as "prior@top"
    module: str  # file in stages/, such as "prior"
    key: str  # entry of its section that the stage runs for, such as "top"; "" for a stage that runs once
    deps: tuple[str, ...]
    params: tuple[str, ...]
    outs: tuple[str, ...]
    metrics: tuple[str, ...]
    plots: tuple[str, ...]  # outputs in plots/; the section `plots` of dvc.yaml defines how DVC draws them
    command: str = ""
    frozen: bool = False  # DVC does not run it

    @property
    def cli_name(self) -> str:
        """Name that commands print, such as prior_top."""
        return cli_name(self.name)

    @property
    def key_name(self) -> str:
        """Kind of the key: the level of a prior, or the artifact that the images come from."""
        return "level" if self.module == "prior" else "artifact"

    @property
    def artifacts(self) -> tuple[str, ...]:
        """Dependencies that other stages write."""
        return tuple(path for path in self.deps if path.startswith("artifacts/"))

    @property
    def all_outs(self) -> tuple[str, ...]:
        """Outputs, metrics and plots."""
        return (*self.outs, *self.metrics, *self.plots)

    def writes(self, path: str) -> bool:
        """Return whether a path is an output or holds one."""
        return any(out == path or out.startswith(f"{path}/") for out in self.outs)

    def depends_on(self, other: "Stage") -> bool:
        """Return whether this stage reads an output of another one."""
        return any(other.writes(dep) for dep in self.deps)


def cli_name(name: str) -> str:
    """Return the name by which commands print a stage, given that name or the one in DVC: prior_top for prior@top."""
    return name.replace("@", "_")


def stages(values: Mapping[str, Any], file: Path = FILE) -> dict[str, Stage]:
    """Return the stages of dvc.yaml by their names in DVC, for given contents of params.yaml.

    Raises UserError if dvc.yaml does not have the form of a DVC pipeline.
    """
    return parse(params.read(file), values, file)


def parse(pipeline: Mapping[str, Any], values: Mapping[str, Any], file: Path = FILE) -> dict[str, Stage]:
    """Return the stages in the contents of dvc.yaml, as `stages` does; `file` names it in errors."""
    stages = {}
    try:
        for name, entry in pipeline["stages"].items():
            if name == VERSIONS_STAGE:
                continue
            if "foreach" in entry:
                for key, item in _resolve(entry["foreach"], values).items():
                    stage = _stage(name, key, entry["do"], {**values, "key": key, "item": item})
                    stages[stage.name] = stage
            else:
                stages[name] = _stage(name, "", entry, values)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file.name} is not a valid pipeline: {error}.",
            where=file,
            fix=f"Restore the file: git checkout {file}. Or show the error in full: dvc stage list",
            code=2,
        ) from error
    return stages


def read_lock() -> dict[str, Any]:
    """Return the entries of dvc.lock by stage name in DVC; none if there is no file.

    Raises UserError if the file is not valid.
    """
    return parse_lock(params.read(LOCK)) if LOCK.is_file() else {}


def parse_lock(contents: Mapping[str, Any], path: Path = LOCK) -> dict[str, Any]:
    """Return the entries of a dvc.lock by stage name in DVC. Raises UserError if one does not have the form of DVC."""
    entries = contents.get("stages", {})
    problem = "stages must be a mapping" if not isinstance(entries, dict) else ""
    problem = problem or next((text for name, entry in entries.items() if (text := _lock_problem(name, entry))), "")
    if problem:
        raise UserError(
            f"{path.name} is not valid: {problem}.",
            where=path,
            fix=restore_lock(path),
            code=2,
        )
    return entries


def restore_lock(path: Path = LOCK) -> str:
    """Return the fix for a damaged dvc.lock."""
    return f"Restore the file: git checkout {path}. Or delete it: results are restored from cache."


def _lock_problem(name: str, entry: Any) -> str:
    """Describe what is wrong with an entry of dvc.lock; "" if nothing is."""
    if not isinstance(entry, dict):
        return f"stages.{name} must be a mapping"
    files = entry.get("params", {})
    if not isinstance(files, dict):
        return f"stages.{name}.params must be a mapping"
    for file, values in files.items():
        if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
            return f"stages.{name}.params.{file} must be a mapping of settings"
    for field in ("deps", "outs"):
        items = entry.get(field, [])
        if not isinstance(items, list) or not all(_is_path_entry(item) for item in items):
            return f"stages.{name}.{field} must be a list of entries with a path"
    return ""


def _is_path_entry(item: Any) -> bool:
    return isinstance(item, dict) and isinstance(item.get("path"), str) and isinstance(item.get("md5", ""), str)


def differences(pipeline: Mapping[str, Any], packaged: Mapping[str, Any]) -> list[str]:
    """Return the stages of the package's dvc.yaml that a project lacks or has changed; "plots" if it lacks any plot.

    A project may add stages and plots, and may freeze stages.
    """
    stages = {
        name: {key: value for key, value in entry.items() if key != "frozen"}
        for name, entry in pipeline["stages"].items()
    }
    differing = [name for name, entry in packaged["stages"].items() if stages.get(name) != entry]
    missing_plots = [plot for plot in packaged["plots"] if plot not in pipeline.get("plots", [])]
    return [*differing, *(["plots"] if missing_plots else [])]


def leftover_artifacts(stages: Iterable[Stage], folder: Path = Path()) -> list[str]:
    """Return the artifacts of a project that none of its stages writes.

    DVC leaves them when settings remove their stage, such as artifacts/accepted after the last entry of `rejections`.
    """
    artifacts = [path.parent for pattern in ARTIFACTS for path in folder.glob(f"{pattern}/{artifact.MANIFEST}")]
    names = sorted(path.relative_to(folder).as_posix() for path in artifacts)
    return [name for name in names if not any(stage.writes(name) for stage in stages)]


def find(name: str, stages: Mapping[str, Stage]) -> Stage:
    """Find a stage by its name on the command line (prior_top) or in DVC (prior@top).

    Raises UserError if there is none.
    """
    for stage in stages.values():
        if cli_name(name) == stage.cli_name:
            return stage
    keyed = [stage for stage in stages.values() if stage.key and stage.module == name]
    options = ", ".join(stage.cli_name for stage in keyed or stages.values())
    what = f"{name} is not a valid stage{f': it runs once per {keyed[0].key_name}' if keyed else ''}."
    raise UserError(what, where=FILE, fix=f"Use one of: {options}", code=2)


def _stage(module: str, key: str, entry: Mapping[str, Any], values: Mapping[str, Any]) -> Stage:
    def paths(field: str) -> tuple[str, ...]:
        # An item is a path, or a mapping of one path to its options.
        items = (next(iter(item)) if isinstance(item, dict) else item for item in entry.get(field, ()))
        return tuple(_resolve(item, values) for item in items)

    outs = paths("outs")
    return Stage(
        f"{module}@{key}" if key else module,
        module,
        key,
        paths("deps"),
        # A mapping lists keys of another file than params.yaml: the result versions.
        tuple(_resolve(name, values) for name in entry.get("params", ()) if isinstance(name, str)),
        outs=tuple(path for path in outs if not path.startswith(PLOTS)),
        metrics=paths("metrics"),
        plots=tuple(path for path in outs if path.startswith(PLOTS)),
        command=_resolve(entry.get("cmd", ""), values),
        frozen=bool(entry.get("frozen", False)),
    )


def _resolve(text: str, values: Mapping[str, Any]) -> Any:
    if template := re.fullmatch(r"\$\{([\w.]+)\}", text):
        return _look_up(values, template[1])  # of any type: `foreach: ${priors}` is a mapping
    return re.sub(r"\$\{([\w.]+)\}", lambda match: str(_look_up(values, match[1])), text)


def _look_up(values: Mapping[str, Any], key: str) -> Any:
    if (value := params.look_up(values, key)) is None:
        raise KeyError(key)
    return value
