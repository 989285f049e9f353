"""Imports between packages point down, without cycles, and each library is imported in one place."""

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("pipeline", "stages", "models")

# From top to bottom. A package imports from itself and from the layers below it. A stage file is a package of its own:
# stages exchange data on disk, through stages/formats.
LAYERS = (
    ("vqvae2.py",),
    ("pipeline",),
    ("stages/*.py",),
    ("stages/evaluation",),
    ("stages/inference",),
    ("stages/training", "stages/mapping"),
    ("stages/tracking",),
    ("stages/runtime",),
    ("stages/formats",),
    ("stages/images", "stages/metrics"),
    ("stages/config.py", "stages/errors.py"),
    ("stages/cluster_config.py",),
    ("models",),
)
DEPTH = {package: depth for depth, layer in enumerate(LAYERS) for package in layer}

# Where a library may be imported, by prefix of the path.
LIBRARIES = {
    "ray": ("stages/",),
    "torch.distributed": ("stages/training/",),
    "mlflow": ("stages/tracking/", "pipeline/mlflow_model.py"),
    "hydra": ("pipeline/compose.py",),
    "omegaconf": ("pipeline/compose.py",),
    "typer": (
        "pipeline/cli.py",
        "pipeline/cli_ablate.py",
        "pipeline/cli_common.py",
        "pipeline/cli_models.py",
        "pipeline/cli_project.py",
    ),
    "pickle": (),
    "torchvision": (),
    "dvc": (),  # called as a program
}


def _source_files() -> Iterator[Path]:
    """Yield the Python API and the Python files of the three packages, relative to the root."""
    yield Path("vqvae2.py")
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path.relative_to(ROOT)


FILES = tuple(_source_files())


@cache
def _imports(path: Path) -> set[str]:
    """Return the modules that a file imports, also inside functions.

    `from a import b` counts as a.b alone if that is a module of ours, otherwise as a and as a.b.
    """
    modules = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports must be absolute"
            for name in (f"{node.module}.{alias.name}" for alias in node.names):
                modules |= {name} if Path(*name.split(".")).with_suffix(".py") in FILES else {str(node.module), name}
    return modules


@cache
def _imported_files(path: Path) -> set[Path]:
    """Return the files of our packages that a file imports. A package counts only if its __init__.py has content."""
    imported = set()
    for module in _imports(path):
        parts = module.split(".")
        for file in (Path(*parts).with_suffix(".py"), Path(*parts, "__init__.py")):
            if file in FILES and file != path and (ROOT / file).stat().st_size:
                imported.add(file)
    return imported


def _package(path: Path) -> str:
    """Return the name in LAYERS of the package that a file belongs to."""
    if path.parts[0] != "stages":
        return path.parts[0]
    if len(path.parts) > 2:
        return "/".join(path.parts[:2])
    return path.as_posix() if path.as_posix() in DEPTH else "stages/*.py"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_down(path):
    """A file imports only files of its own package and of the layers below.

    The code of a model in MLflow runs outside of this project: it imports the public API.
    """
    if path.as_posix() == "pipeline/mlflow_model.py":
        assert {file.as_posix() for file in _imported_files(path)} == {"vqvae2.py"}
        return
    package = _package(path)
    upward = {
        file.as_posix()
        for file in _imported_files(path)
        if DEPTH[_package(file)] <= DEPTH[package] and (_package(file) != package or package == "stages/*.py")
    }
    assert not upward, f"{path} must not import {', '.join(sorted(upward))}"


def test_imports_have_no_cycles():
    """Modules can be ordered so that each imports only earlier ones."""
    try:
        graphlib.TopologicalSorter({path: _imported_files(path) for path in FILES}).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(str(path) for path in reversed(error.args[1])))


@pytest.mark.parametrize("library", LIBRARIES)
def test_library_is_imported_in_one_place(library):
    """A library that could be replaced is imported in the files named for it and nowhere else."""
    for path in FILES:
        if any(name == library or name.startswith(f"{library}.") for name in _imports(path)):
            assert path.as_posix().startswith(LIBRARIES[library]), f"{path} imports {library}"


def test_no_file_is_unpickled():
    """Loading a file cannot run code: `torch.load` reads published networks and checkpoints as weights only."""
    names = ("metrics/features", "metrics/vgg", "formats/rosinality", "formats/pretrained")
    readers = {f"stages/{name}.py" for name in names}
    for path in FILES:
        text = (ROOT / path).read_text(encoding="utf-8")
        assert not re.search(r"weights_only=False|allow_pickle=True|hydra.*instantiate|\.extract(all)?\(", text), path
        for line in re.findall(r".*torch\.load\(.*", text):
            assert path.as_posix() in readers and "weights_only=True" in line, f"{path}: {line}"


def test_commands_import_no_slow_library():
    """Importing torch takes seconds, which every command would wait for."""
    modules = ", ".join(f"pipeline.commands.{name}" for name in ("run", "status", "config", "init", "demo"))
    code = f"import sys, {modules}; print(*sorted({{'torch', 'ray', 'mlflow', 'matplotlib'}} & sys.modules.keys()))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == ""
