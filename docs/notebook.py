"""Make tutorial.ipynb: the Python of tutorial.md as a notebook, with the pictures that it shows.

    python docs/notebook.py PROJECT    run the cells in a project with a finished run, and write the notebook

The file follows nbformat 4.5. Its cells are plain Python, so running them needs neither Jupyter nor a kernel.
"""

import ast
import base64
import contextlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
PAGE, NOTEBOOK = FOLDER / "tutorial.md", FOLDER / "tutorial.ipynb"
BLOCK = re.compile(r"^```python\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
BEGIN, END = "## Use the model from Python\n", "## Change something\n"  # headings of tutorial.md
TITLE = """\
# A trained model in Python

This is the part *Use the model from Python* of the [tutorial](tutorial.md). Run it in the folder of a project in which
`vqvae2 run` or `vqvae2 demo` has finished. The model is in `artifacts`; images are PIL images."""
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}

Cell = dict[str, Any]


def cells(page: str) -> list[Cell]:
    """Convert the part of the tutorial to cells: text, and code without outputs."""
    texts = BLOCK.split(page[page.index(BEGIN) + len(BEGIN) : page.index(END)])  # text, code, text, code ...
    texts[0], texts[-1] = TITLE, ""  # in place of sentences on the notebook
    result: list[Cell] = []
    for number, text in enumerate(texts):
        source = text.strip().splitlines(keepends=True)
        cell: Cell = {"id": f"cell-{number}", "metadata": {}, "source": source}
        if number % 2:
            result.append({"cell_type": "code", **cell, "execution_count": None, "outputs": []})
        elif source:
            result.append({"cell_type": "markdown", **cell})
    return result


def run(notebook: list[Cell], namespace: dict[str, Any]) -> list[Cell]:
    """Run the cells in a namespace; return them with what they print, and the value of a last line that has one."""
    result: list[Cell] = []
    for cell in notebook:
        if cell["cell_type"] == "code":
            count = 1 + sum(earlier["cell_type"] == "code" for earlier in result)
            cell = {**cell, "execution_count": count, "outputs": _outputs("".join(cell["source"]), count, namespace)}
        result.append(cell)
    return result


def _outputs(source: str, count: int, namespace: dict[str, Any]) -> list[dict[str, Any]]:
    statements = ast.parse(source).body
    last = statements[-1] if isinstance(statements[-1], ast.Expr) else None
    statements = statements[:-1] if last else statements
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(ast.Module(statements, []), PAGE.name, "exec"), namespace)
        value = eval(compile(ast.Expression(last.value), PAGE.name, "eval"), namespace) if last else None
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        text = printed.getvalue().splitlines(keepends=True)
        outputs.append({"output_type": "stream", "name": "stdout", "text": text})
    if value is not None:
        data: dict[str, Any] = {"text/plain": [repr(value)]}
        if hasattr(value, "_repr_png_"):  # how a notebook shows a PIL image
            data = {"image/png": base64.b64encode(value._repr_png_()).decode(), "text/plain": ["<PIL.Image.Image>"]}
        outputs.append({"output_type": "execute_result", "execution_count": count, "metadata": {}, "data": data})
    return outputs


def main() -> None:
    """Run the tutorial's cells in the project of the command line, and write the notebook."""
    page = PAGE.read_text(encoding="utf-8")
    with contextlib.chdir(sys.argv[1]):
        executed = run(cells(page), {})
    metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    notebook = {"cells": executed, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
