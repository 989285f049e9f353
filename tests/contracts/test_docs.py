"""Documentation names only files, functions and pages that exist."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from pipeline import conf_layers, new_project

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FOLDERS = ("pipeline", "stages", "models", "conf", "tests", "benchmarks", "docs")
FILES_OF_A_PROJECT = {f"conf/{conf_layers.PROJECT}.yaml", *new_project.MUST_BE_NEW}  # written by `vqvae2 init`
PLACEHOLDER = re.compile(r"[A-Z]{3,}")  # NAME, LEVEL


def _page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def _anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@cache
def _definitions() -> set[str]:
    """Return the names of all functions and classes."""
    return {
        node.name
        for package in ("pipeline", "stages", "models")
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }


@pytest.mark.parametrize("page", PAGES, ids=_page_id)
def test_links_lead_to_pages(page):
    """Each relative link leads to a file, and its anchor to a heading."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            name, _, anchor = target.partition("#")
            path = (page.parent / name) if name else page
            assert path.exists(), f"{target} does not exist"
            assert not anchor or anchor in _anchors(path), f"{target} has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=_page_id)
def test_paths_exist(page):
    """Each path in code style exists; capitals such as NAME stand for a name of the reader's choice."""
    text = page.read_text(encoding="utf-8")
    paths = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)`", text)
    missing = [
        path
        for path in paths
        if not PLACEHOLDER.search(path) and path not in FILES_OF_A_PROJECT and not (ROOT / path).exists()
    ]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=_page_id)
def test_functions_exist(page):
    """Each function or method in code style, such as `train()`, is defined in the code."""
    names = set(re.findall(r"`(?:\w+\.)*(\w+)\(\)`", page.read_text(encoding="utf-8")))
    assert names <= _definitions()


@pytest.mark.parametrize("page", ["architecture.md", "glossary.md"])
def test_classes_exist(page):
    """Each class that the page names, such as `Objective`, is defined in the code."""
    names = set(re.findall(r"`(_?[A-Z][a-z]+[A-Za-z]+)`", (ROOT / "docs" / page).read_text(encoding="utf-8")))
    assert names and names <= _definitions()
