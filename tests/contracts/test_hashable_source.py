"""Source that determines results is written in the forms that pipeline/stage_source.py follows."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.stage_source import PACKAGES

ROOT = Path(__file__).parents[2]
FILES = sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def problems(tree: ast.Module) -> Iterator[str]:
    """Name the statements whose definitions a result version would miss."""
    for statement in tree.body:
        if isinstance(statement, ast.If | ast.Try | ast.With | ast.For | ast.While):
            for node in ast.walk(statement):
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    yield f"line {node.lineno}: {node.name} is defined inside of another statement"
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in PACKAGES:
                    yield f"line {node.lineno}: import {alias.name}; use: from PACKAGE import NAME"
        if isinstance(node, ast.ImportFrom) and (node.level or any(alias.name == "*" for alias in node.names)):
            yield f"line {node.lineno}: relative or star import; use: from PACKAGE import NAME"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_definition_is_reached_by_its_name(path: Path):
    """Imports name what they import, and definitions are statements of their module."""
    assert list(problems(ast.parse((ROOT / path).read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "text",
    ["import stages.shard", "from . import shard", "from stages.shard import *", "if True:\n    def run(): ...\n"],
)
def test_other_forms_are_named(text: str):
    """The check above can fail."""
    assert len(list(problems(ast.parse(text)))) == 1
