"""Build hook of the wheel: the packages and the files they read, as one package `vqvae2`. Not part of the wheel.

In the repository, `pipeline`, `stages` and `models` are packages of the top level. Installed under such names, they
would hide packages of users, or be hidden by them. So the wheel has the same files below `vqvae2/`, and imports of the
three packages get this prefix when the wheel is built:

    repository                                      wheel
    vqvae2.py                                       vqvae2/__init__.py
    stages/shard.py                                 vqvae2/stages/shard.py
    conf/, dvc.yaml, .dvc/plots/, data/ ...         vqvae2/conf/, vqvae2/dvc.yaml ...
    from stages.errors import UserError             from vqvae2.stages.errors import UserError

An editable installation is the repository itself. Code that names a module in a string derives it from `__name__`.
"""

import ast
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

DISTRIBUTION = "vqvae2"
PACKAGES = ("pipeline", "stages", "models")
SUFFIXES = (".py", ".json", ".j2", ".css", ".js")  # of files in the packages
# Files that `vqvae2 init` and `vqvae2 demo` copy or compose; patterns relative to the root.
PROJECT_FILES = (
    "conf/**/*.yaml",
    "dvc.yaml",
    ".dvc/.gitignore",
    ".dvc/config",
    ".dvc/plots/*",
    ".dvcignore",
    ".gitignore",
    "data/fluent-emoji-64.zip",
)


class WheelHook(BuildHookInterface):
    """Hook of hatchling that writes the files of the wheel to a temporary folder."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the files and the console script; `version` is "editable" or "standard"."""
        if version == "editable":
            return
        self.folder = Path(tempfile.mkdtemp(prefix="vqvae2-wheel-"))
        for source, name in wheel_files(Path(self.root)):
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".py":
                path.write_text(add_prefix(source.read_text(encoding="utf-8")), encoding="utf-8")
                build_data["force_include"][str(path)] = name
            else:
                build_data["force_include"][str(source)] = name
        scripts = self.metadata.core.scripts
        scripts |= {name: f"{DISTRIBUTION}.{target}" for name, target in scripts.items()}

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Delete the temporary folder."""
        if version != "editable":
            shutil.rmtree(self.folder)


def wheel_files(root: Path) -> Iterator[tuple[Path, str]]:
    """Yield the files of the wheel with their names in it."""
    yield root / "vqvae2.py", f"{DISTRIBUTION}/__init__.py"
    for path in sorted((root / "hydra_plugins").glob("*.py")):  # Hydra looks for plugins in this namespace
        yield path, path.relative_to(root).as_posix()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*")):
            if path.suffix in SUFFIXES and path != root / "pipeline" / "wheel.py":
                yield path, f"{DISTRIBUTION}/{path.relative_to(root).as_posix()}"
    for pattern in PROJECT_FILES:
        for path in sorted(root.glob(pattern)):
            yield path, f"{DISTRIBUTION}/{path.relative_to(root).as_posix()}"


def add_prefix(text: str) -> str:
    """Return Python code whose imports of PACKAGES are imports from DISTRIBUTION; lines keep their numbers."""
    lines = text.splitlines(keepends=True)
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and _is_ours(node.module or ""):
            _replace(lines, node.lineno, f"from {node.module}", f"from {DISTRIBUTION}.{node.module}")
        elif isinstance(node, ast.Import):
            for alias in (alias for alias in node.names if _is_ours(alias.name)):
                if "." not in alias.name:  # `import models` binds that name
                    _replace(lines, node.lineno, f"import {alias.name}", f"from {DISTRIBUTION} import {alias.name}")
                elif alias.asname or _never_used(tree, alias.name.partition(".")[0]):
                    _replace(lines, node.lineno, f"import {alias.name}", f"import {DISTRIBUTION}.{alias.name}")
                else:
                    raise ValueError(f"line {node.lineno}: write `import {alias.name} as ...`, or import from it")
    return "".join(lines)


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in PACKAGES


def _never_used(tree: ast.AST, name: str) -> bool:
    return not any(isinstance(node, ast.Name) and node.id == name for node in ast.walk(tree))


def _replace(lines: list[str], number: int, old: str, new: str) -> None:
    if lines[number - 1].count(old) != 1:
        raise ValueError(f"line {number}: expected `{old}` once, got: {lines[number - 1].strip()}")
    lines[number - 1] = lines[number - 1].replace(old, new)
