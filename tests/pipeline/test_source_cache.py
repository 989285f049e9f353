"""Data computed from source code is saved by the contents of the source, beside Python's compiled files."""

import sys
from pathlib import Path

import pytest

from pipeline import source_cache


@pytest.fixture
def parser(tmp_path: Path) -> Path:
    """A module that parses the source in stages/, which has one file."""
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "codes.py").write_text("LEVELS = 2\n")
    parser = tmp_path / "parser.py"
    parser.write_text("# first revision\n")
    return parser


class Computation:
    """A computation that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> dict[str, int]:
        self.calls += 1
        return {"calls": self.calls}


def load(parser: Path, compute: Computation) -> dict[str, int]:
    """Load as a new process does, without what this process has in memory."""
    source_cache._load_or_compute.cache_clear()
    files = sorted((parser.parent / "stages").rglob("*.py"))
    return source_cache.load_or_compute([parser], files, parser.parent, compute)


def saved_files(parser: Path) -> list[Path]:
    return sorted(parser.parent.rglob("*.json"))


def test_a_later_process_computes_nothing(parser: Path) -> None:
    """The file of one process serves the next one."""
    compute = Computation()
    assert load(parser, compute) == load(parser, compute) == {"calls": 1}
    assert [path.parent.name for path in saved_files(parser)] == ["__pycache__"]


@pytest.mark.parametrize("changed", ["stages/codes.py", "stages/prior.py", "parser.py"])
def test_changed_source_is_computed_again_and_replaces_the_file(parser: Path, changed: str) -> None:
    """A changed or new file of the source, or another parser, makes the saved file useless."""
    compute = Computation()
    load(parser, compute)
    (parser.parent / changed).write_text("LEVELS = 3\n")
    assert load(parser, compute) == {"calls": 2}
    assert len(saved_files(parser)) == 1


def test_a_moved_definition_is_computed_again(parser: Path) -> None:
    """The name of a file decides results as well as its contents."""
    compute = Computation()
    load(parser, compute)
    (parser.parent / "stages" / "codes.py").rename(parser.parent / "stages" / "prior.py")
    assert load(parser, compute) == {"calls": 2}


def test_a_damaged_file_is_computed_again(parser: Path) -> None:
    """A file that is not JSON is replaced."""
    compute = Computation()
    load(parser, compute)
    saved_files(parser)[0].write_text("{")
    assert load(parser, compute) == {"calls": 2}


def test_nothing_is_saved_where_python_saves_no_compiled_code(parser: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PYTHONDONTWRITEBYTECODE and `python -B` hold for this file too."""
    compute = Computation()
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert [load(parser, compute), load(parser, compute)] == [{"calls": 1}, {"calls": 2}]
    assert saved_files(parser) == []


def test_a_folder_that_cannot_be_written_to_is_no_error(parser: Path) -> None:
    """A program in a folder without write permission works, more slowly."""
    (parser.parent / "__pycache__").write_text("a file where the folder would be")
    assert load(parser, Computation()) == {"calls": 1}
