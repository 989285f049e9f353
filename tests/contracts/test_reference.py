"""docs/reference matches the code, and documents every environment variable."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs/reference"
VARIABLE = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*_?")


@cache
def _environment_names() -> set[str]:
    """Return the names of environment variables in the code."""
    return set(_find_environment_names())


def _find_environment_names() -> Iterator[str]:
    """Yield names of environment variables: arguments of os.environ, and every text such as "RAY_ADDRESS"."""
    for package in ("pipeline", "stages", "models"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                for argument in (*_environ_arguments(node), *([node] if isinstance(node, ast.Constant) else [])):
                    name = argument.value if isinstance(argument, ast.Constant) else None
                    if isinstance(name, str) and VARIABLE.fullmatch(name) and ("_" in name or argument is not node):
                        yield name


def _environ_arguments(node: ast.AST) -> list[ast.expr]:
    match node:
        case ast.Call(func=ast.Attribute(value=ast.Attribute(attr="environ")), args=[first, *_]):
            return [first]
        case ast.Call(func=ast.Attribute(attr="getenv"), args=[first, *_]):
            return [first]
        case ast.Subscript(value=ast.Attribute(attr="environ"), slice=name):
            return [name]
    return []


def test_generated_pages_are_current():
    """The pages of settings, commands and exit codes are what `make docs` writes."""
    command = [sys.executable, str(REFERENCE / "generate.py"), "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_environment_variable_is_documented():
    """Each variable that the code names is in environment.md; a prefix counts if one of its variables is there."""
    text = (REFERENCE / "environment.md").read_text(encoding="utf-8")
    names = _environment_names()
    assert {"RAY_ADDRESS", "PYTHONPATH"} <= names
    assert not sorted(name for name in names if f"`{name}" not in text)


def test_every_documented_variable_exists():
    """Each variable of ours in environment.md is named in the code."""
    text = (REFERENCE / "environment.md").read_text(encoding="utf-8")
    assert set(re.findall(r"VQVAE2_[A-Z0-9_]+", text)) <= _environment_names()
