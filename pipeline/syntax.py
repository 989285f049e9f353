"""Syntax trees of Python code, without what cannot affect a result.

That is: comments, docstrings, annotations, formatting, and texts of errors.
"""

import ast
import json
from collections.abc import Iterator
from typing import Any

PREFIX = "vqvae2."  # of these names in imports of the wheel (pipeline/wheel.py); removed, so that its hashes are equal
ANNOTATIONS = frozenset({"annotation", "returns"})  # fields of syntax trees
SKIPPED_FIELDS = ANNOTATIONS | frozenset({"type_comment", "type_params", "ctx", "kind", "type_ignores"})


def parse(text: str) -> ast.Module:
    """Parse the text of a module."""
    tree: ast.Module = _Normalize().visit(ast.parse(text))
    return tree


def defined_names(statement: ast.stmt) -> Iterator[str]:
    match statement:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            yield statement.name
        case ast.Assign():
            for target in statement.targets:
                yield from (node.id for node in ast.walk(target) if isinstance(node, ast.Name))
        case ast.AnnAssign() if isinstance(statement.target, ast.Name):
            yield statement.target.id


def walk(node: ast.AST, *, is_boundary: bool) -> Iterator[ast.AST]:
    """Walk a syntax tree, including annotations only at boundaries.

    Boundaries are the parameters of a stage's `run`, and class fields. Elsewhere, the code that creates an object names
    its class.
    """
    yield node
    for name, field in ast.iter_fields(node):
        for child in field if isinstance(field, list) else [field]:
            if not isinstance(child, ast.AST):
                continue
            if name not in ANNOTATIONS:
                is_parameter = is_boundary and isinstance(child, ast.arguments | ast.arg)
                is_field = isinstance(node, ast.ClassDef) and isinstance(child, ast.AnnAssign)
                yield from walk(child, is_boundary=is_parameter or is_field)
            elif is_boundary:
                yield from _walk_annotation(child)


def _walk_annotation(annotation: ast.AST) -> Iterator[ast.AST]:
    for node in ast.walk(annotation):
        yield node
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            yield ast.Name(node.value, ast.Load())  # written as a string, such as "Shards"


def serialize(node: ast.AST) -> str:
    """Write a syntax tree as text, without what cannot affect a result.

    The text is the same for every Python version: empty fields are left out, and so are fields that later versions
    added.
    """
    return json.dumps(_to_json(node), separators=(",", ":"))


def _to_json(value: Any) -> Any:
    if isinstance(value, ast.AST):
        fields = [(name, getattr(value, name, None)) for name in value._fields if name not in SKIPPED_FIELDS]
        pairs = [
            [name, _to_json(_without_docstrings(value, field) if name == "body" else field)] for name, field in fields
        ]
        return [type(value).__name__, *(pair for pair in pairs if pair[1] not in (None, []))]
    if isinstance(value, list):
        return [_to_json(item) for item in value]
    return value if isinstance(value, str | int | bool | None) else repr(value)


def _without_docstrings(node: ast.AST, statements: Any) -> Any:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [statement for statement in statements if not is_docstring(statement)]
    return statements


def is_docstring(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


class _Normalize(ast.NodeTransformer):
    """Removes arguments of UserError and of raised ValueError, which reach no artifact, and PREFIX of imports."""

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        return ast.ImportFrom((node.module or "").removeprefix(PREFIX), node.names, node.level)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if isinstance(node.func, ast.Name) and node.func.id == "UserError":
            return ast.Call(node.func, [], [])
        return self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        error = node.exc
        if isinstance(error, ast.Call) and isinstance(error.func, ast.Name) and error.func.id == "ValueError":
            return ast.Raise(error.func)
        return self.generic_visit(node)
