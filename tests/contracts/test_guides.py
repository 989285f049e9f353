"""The pages for users hold: the tutorial's notebook runs, commands parse, errors and pages exist."""

import importlib.util
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import chdir
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from ruamel.yaml import YAML
from typer.main import get_command

from pipeline.cli import app
from tests.mini_pipeline import MiniPipeline


def _load(path: Path) -> ModuleType:
    """Import a script of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", *DOCS.glob("*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
NOTEBOOK = _load(DOCS / "notebook.py")
STAND_INS = {"N": "1", "...": "x"}  # of numbers and of what a page leaves out


def _commands(page: Path) -> Iterator[list[str]]:
    """Yield the arguments of each `vqvae2` command in a block of a page, as a shell would split them."""
    for language, block in BLOCK.findall(page.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines() if language != "python" else ():
            words = shlex.split(line, comments=True) if line.lstrip().startswith("vqvae2 ") else []
            if words and not words[1].startswith("-"):  # an option of the program itself
                yield [STAND_INS.get(word, word) for word in words[1:]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page: Path):
    """Every command and option in the blocks of a page exists, with values that its options accept."""
    run = get_command(app)  # `vqvae2 run` without subcommands, which holds all other commands
    for name, *arguments in _commands(page):
        command = run if name == "run" else run.commands[name]  # type: ignore[attr-defined]
        with chdir(ROOT):
            command.make_context(name, arguments)


@pytest.fixture(scope="module")
def cells() -> list[dict[str, Any]]:
    """The cells of the tutorial's notebook."""
    return list(json.loads((DOCS / "tutorial.ipynb").read_text(encoding="utf-8"))["cells"])


def test_notebook_runs_in_a_finished_project(cells, finished_pipeline: MiniPipeline, tmp_path: Path):
    """Cell after cell, with a picture where the notebook shows one."""
    (tmp_path / "artifacts").symlink_to(finished_pipeline.path("vqvae").parent)
    with chdir(tmp_path):
        executed = NOTEBOOK.run(cells, {})
    assert [_output_types(cell) for cell in executed] == [_output_types(cell) for cell in cells]
    assert sum("image/png" in _output_types(cell) for cell in cells) == 5


def _output_types(cell: Mapping[str, Any]) -> list[str]:
    return [name for output in cell.get("outputs", ()) for name in output.get("data", {"text": ""})]


def test_notebook_has_the_python_of_the_tutorial(cells):
    """Its texts and code are those of the page; `make notebook` renews them together with the pictures."""
    page = (DOCS / "tutorial.md").read_text(encoding="utf-8")
    assert [cell["source"] for cell in cells] == [cell["source"] for cell in NOTEBOOK.cells(page)]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert code == [block.strip() for language, block in BLOCK.findall(page) if language == "python"]


def test_errors_of_troubleshooting_exist():
    """The beginning of each error is that of a text in the code."""
    beginnings = re.findall(r"^\| `([^`]+)` \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    code = "\n".join(
        path.read_text(encoding="utf-8") for name in ("pipeline", "stages") for path in (ROOT / name).rglob("*.py")
    )
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # texts over several lines
    missing = [text for text in beginnings if not re.search(rf'"{re.escape(text)}\b', code)]
    assert len(beginnings) > 20 and not missing


def test_site_has_every_page():
    """The navigation of the site lists each page of docs/ once."""
    navigation = YAML(typ="safe").load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    listed = re.findall(r"[\w/]+\.md", str(navigation))
    assert sorted(listed) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))
