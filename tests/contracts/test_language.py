"""Docstrings, names and texts use the field's standard words (docs/glossary.md)."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("pipeline", "stages", "models")
NAME_FOLDERS = (*PACKAGES, "tests", "benchmarks", "docs")
TEXT_FOLDERS = (*NAME_FOLDERS, "conf", ".ci")
TEXT_SUFFIXES = {".py", ".md", ".yaml", ".toml", ".cff", ".j2", ".txt", ""}
MAX_SOURCE_LINES = 374

# A docstring begins with a noun phrase or, for a function, with an imperative verb.
QUESTION_WORDS = {"Who", "Whom", "Whose", "What", "Where", "When", "How", "Whether", "Which", "Why"}

# Vague nouns: a name states what it holds.
VAGUE_NAMES = """
    found told kept made said here there own trouble aside each one some given known meant wanted whole good seen places
    few
"""
# Names of this project that a standard term has replaced.
REPLACED_NAMES = """
    Desk desk DeskReporter open_desk hears_stop refused_once pulse beat watching Journey journey Delivery Machine Sender
    Several Telling Order Pick Batches _in_a_sentence _cut_off connected beside heard answering owned replacing
    by_worker take_up spoilt coming averaged draws_alike Totals batched floats to_bytes measuring Found closeness
    Share _packed Choice given_rows _fold OF_TORCH OURS described note_lost Meeting FRESH AFRESH _letter _word
    _meant of_a_file clip averaging ARRIVAL AGAIN
"""
# Names that are vague for a value and fine for a function, such as a file's `open`.
VAGUE_VALUES = {"open", "since"}

# Phrases of the former style, and what to write instead.
PHRASES = {
    r"mend(s|ed|ing)?": "fix",
    r"anew": "again, regenerate",
    r"some times": "repeatedly",
    r"without a word": "unexpectedly",
    r"lost touch": "lost connection to a peer",
    r"(?<!there )is no (override|setting|command)": "is not a valid ...",
    r"(give|gives|gave|leave|leaves|left) word": "report",
    r"(who|whoever|nobody|whom) (hears?|doubts?|heard)": "name the receiver",
    r"goes home|brings? home": "download",
    r"stands? (beside|behind)": "is next to",
    r"sign of life|signs of life": "heartbeat",
    r"in (its|their|his) own words|words of (its|their) own": "quote the message",
    r"what became of": "name the result",
    r"the desk|a desk|the journey|a journey": "control actor, transfer plan",
}


def _python_files(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def _text_files() -> Iterator[Path]:
    candidates = [path for folder in TEXT_FOLDERS for path in sorted((ROOT / folder).rglob("*"))]
    for path in (*candidates, *sorted(ROOT.iterdir())):
        is_text = path.suffix in TEXT_SUFFIXES and path.name not in {".git", "constraints.txt", "LICENSE"}
        if path.is_file() and is_text and path != Path(__file__):
            yield path


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _location(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def _defined_names(tree: ast.AST) -> Iterator[tuple[int, str, bool]]:
    """Yield the line and each name that code defines, and whether it is a value rather than a function or class."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.lineno, node.name, False
            case ast.arg():
                yield node.lineno, node.arg, True
            case ast.Name(ctx=ast.Store()):
                yield node.lineno, node.id, True
            case ast.Attribute(ctx=ast.Store()):
                yield node.lineno, node.attr, True
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                yield node.lineno, name, True
            case ast.alias(asname=str(name)):
                yield node.lineno, name, True


def test_docstrings_name_their_subject():
    """No docstring of the packages begins with a question word."""
    offenders = []
    for path in _python_files(*PACKAGES):
        for node in ast.walk(_parse(path)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node) or ""
                if docstring.split(" ")[0].strip(",.:") in QUESTION_WORDS:
                    offenders.append(f"{_location(path, getattr(node, 'lineno', 1))}: {docstring.splitlines()[0]}")
    assert not offenders, "\n".join(["Begin with a noun phrase or an imperative verb:", *offenders])


def test_tests_have_a_docstring():
    """Each test states in a docstring what it shows."""
    offenders = [
        f"{_location(path, node.lineno)}: {node.name}"
        for path in _python_files("tests")
        for node in ast.walk(_parse(path))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and not ast.get_docstring(node)
    ]
    assert not offenders, "\n".join(["Add a docstring:", *offenders])


def test_names_state_their_content():
    """No variable, parameter, attribute, function or class has a vague or replaced name."""
    vague, replaced = set(VAGUE_NAMES.split()), set(REPLACED_NAMES.split())
    offenders = [
        f"{_location(path, line)}: {name}"
        for path in _python_files(*NAME_FOLDERS)
        for line, name, is_value in _defined_names(_parse(path))
        if name in replaced
        or name.lstrip("_") in vague
        or name.endswith("_SECONDS")  # the suffix is _S
        or (is_value and name in VAGUE_VALUES)
    ]
    assert not offenders, "\n".join(["Name what it holds:", *offenders])


@pytest.mark.parametrize("phrase", PHRASES)
def test_texts_use_standard_terms(phrase):
    """No message, comment or page uses a phrase that a standard term has replaced."""
    pattern = re.compile(rf"\b(?:{phrase})\b", re.IGNORECASE)
    offenders = [
        f"{_location(path, number)}: {line.strip()}"
        for path in _text_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not offenders, "\n".join([f"Write instead: {PHRASES[phrase]}", *offenders])


def test_source_files_are_short():
    """No source file is longer than a reader can survey."""
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in _python_files(*PACKAGES)}
    too_long = [
        f"{path.relative_to(ROOT)}: {length} lines" for path, length in lengths.items() if length > MAX_SOURCE_LINES
    ]
    assert not too_long, "\n".join(too_long)
