"""dvc.yaml, read as DVC reads it: which stages there are, what each reads and what it writes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import params
from stages.errors import UserError

FILE = Path("dvc.yaml")


@dataclass(frozen=True)
class Stage:
    """One stage of dvc.yaml, its templates filled in."""

    name: str  # as DVC has it: "prior@top"
    module: str  # the file in stages/: "prior"
    level: str  # "top"; "" for a stage that runs once
    deps: tuple[str, ...]
    params: tuple[str, ...]
    outs: tuple[str, ...]
    metrics: tuple[str, ...]
    plots: tuple[str, ...]

    @property
    def cli_name(self) -> str:
        """The name on the command line: prior_top."""
        return self.name.replace("@", "_")

    @property
    def code(self) -> tuple[str, ...]:
        return tuple(path for path in self.deps if path.startswith(("stages/", "models/")))

    @property
    def artifacts(self) -> tuple[str, ...]:
        return tuple(path for path in self.deps if path.startswith("artifacts/"))


def stages(values: Mapping[str, Any], file: Path = FILE) -> dict[str, Stage]:
    """List the stages of dvc.yaml by name, for these contents of params.yaml."""
    found = {}
    try:
        for name, entry in params.read(file)["stages"].items():
            if "foreach" in entry:
                for key, item in _fill(entry["foreach"], values).items():
                    stage = _stage(name, key, entry["do"], {**values, "key": key, "item": item})
                    found[stage.name] = stage
            else:
                found[name] = _stage(name, "", entry, values)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"The stages cannot be understood: {error}.",
            where=file,
            fix=f"See what is wrong by: dvc stage list. Or restore the file: git checkout {file}",
            code=2,
        ) from error
    return found


def find(name: str, known: Mapping[str, Stage]) -> Stage:
    """Find a stage by its name here (prior_top) or in DVC (prior@top)."""
    for stage in known.values():
        if name in (stage.name, stage.cli_name):
            return stage
    levels = [stage.cli_name for stage in known.values() if stage.level and stage.module == name]
    options = ", ".join(levels or (stage.cli_name for stage in known.values()))
    what = f"{name} runs once per level." if levels else f"There is no stage {name}."
    raise UserError(what, where=FILE, fix=f"Use one of: {options}", code=2)


def _stage(module: str, level: str, entry: Mapping[str, Any], values: Mapping[str, Any]) -> Stage:
    def paths(field: str) -> tuple[str, ...]:
        # An entry is a path, or a path with options.
        return tuple(_fill(next(iter(one)) if isinstance(one, dict) else one, values) for one in entry.get(field, ()))

    return Stage(
        f"{module}@{level}" if level else module,
        module,
        level,
        *(paths(field) for field in ("deps", "params", "outs", "metrics", "plots")),
    )


def _fill(text: str, values: Mapping[str, Any]) -> Any:
    if whole := re.fullmatch(r"\$\{([\w.]+)\}", text):
        return _look_up(whole[1], values)
    return re.sub(r"\$\{([\w.]+)\}", lambda match: str(_look_up(match[1], values)), text)


def _look_up(key: str, values: Mapping[str, Any]) -> Any:
    value: Any = values
    for step in key.split("."):
        value = value[step]
    return value
