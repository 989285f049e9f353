"""Advice in errors and documentation works: commands that install packages name what an index has."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXTS = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").rglob("*.md"),
    *(path for package in ("pipeline", "stages", "models") for path in (ROOT / package).rglob("*.py")),
]


def test_this_project_is_installed_from_its_folder():
    """It is on no package index, so `pip install vqvae2` cannot work."""
    pattern = re.compile(r"pip install[^\n]*\bvqvae2\b")
    assert not [str(path) for path in TEXTS if pattern.search(path.read_text(encoding="utf-8"))]
