"""Tests of the formatting of messages."""

import io
import sys

from pipeline.text import format_row, shorten_middle


class Terminal(io.StringIO):
    """Standard output that says that it is a terminal."""

    def isatty(self):
        return True


def test_rows_are_wrapped_to_the_width_of_a_terminal(monkeypatch):
    """Further lines are indented; output to a file keeps one line per row, for grep."""
    text = "would run: " + "; ".join(f"train.steps {number} -> 8" for number in range(6))
    assert format_row("vqvae", text) == f"vqvae         {text}"
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(sys, "stdout", Terminal())
    first, *others = format_row("vqvae", text).splitlines()
    assert first.startswith("vqvae         would run: train") and others
    assert all(line.startswith(" " * 14) and len(line) <= 60 for line in others)


def test_long_values_keep_both_ends():
    """The end of a path says more than its middle."""
    text = shorten_middle("/data/" + "x" * 200 + "/photos")
    assert len(text) <= 60 and text.startswith("/data/") and text.endswith("/photos")
