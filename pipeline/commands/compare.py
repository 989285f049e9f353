"""`vqvae2 compare`: two runs side by side, as text, JSON and a page."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from pipeline import compare_page
from pipeline.compared_runs import ComparedRun, find
from pipeline.comparison import Comparison, compare
from pipeline.image_commands import safe_name
from pipeline.text import wrap
from stages.errors import UserError
from stages.formats.artifact import atomic_write
from stages.tracking.journal import redact_secrets

FOLDER = Path("runs/compare")
MAX_SETTINGS, MAX_NUMBERS = 20, 40  # in the text; the page has all


def run(name_a: str, name_b: str, *, out: Path | None, as_json: bool) -> int:
    """Compare two runs, write the page and print the comparison; return the exit status.

    Raises UserError if a name stands for nothing, or the page cannot be written.
    """
    page = out or FOLDER / f"{safe_name(name_a)}-{safe_name(name_b)}.html"
    if page.is_dir() or page.suffix.lower() not in (".html", ".htm"):
        raise UserError(
            f"--out must be an .html file, got {page}.", where="--out", fix="Write it as in --out compare.html", code=2
        )
    comparison = compare(find(name_a), find(name_b))
    page.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(page) as temporary:
        temporary.write_text(compare_page.render(comparison), encoding="utf-8")
    print(
        json.dumps(_facts(comparison, page), indent=1, ensure_ascii=False) if as_json else format_text(comparison, page)
    )
    return 0


def _facts(comparison: Comparison, page: Path) -> dict[str, object]:
    def run_facts(side: ComparedRun) -> dict[str, object]:
        return {"name": side.name, "description": side.description, "pictures": list(side.pictures)}

    return {
        "a": run_facts(comparison.a),
        "b": run_facts(comparison.b),
        "settings": [
            {"key": key, "a": redact_secrets(before), "b": redact_secrets(after)}
            for key, before, after in comparison.settings
        ],
        "numbers": [{**dataclasses.asdict(number), "difference": number.difference} for number in comparison.numbers],
        "notes": [str(note) for note in comparison.notes],
        "page": str(page),
    }


def format_text(comparison: Comparison, page: Path) -> str:
    """Format a comparison for a terminal; the path of its page is last."""
    a, b = comparison.a, comparison.b
    width = max(len(a.name), len(b.name))
    lines = [f"A  {a.name:<{width}}  {a.description}", f"B  {b.name:<{width}}  {b.description}", ""]
    if a.settings and b.settings:
        shown = comparison.settings[:MAX_SETTINGS]
        lines.append("Settings, A -> B" if shown else "No settings differ.")
        lines += [wrap(f"  {change}", "    ") for change in shown]
        if omitted := len(comparison.settings) - len(shown):
            lines.append(f"  and {omitted} more, on the page")
        lines.append("")
    if differing := comparison.differing[:MAX_NUMBERS]:
        rows = [("Numbers", "A", "B", "B - A", ""), *((number.name, *number.cells()) for number in differing)]
        lines += [*_columns(rows), ""]
    if equal := len(comparison.equal):
        lines.append(f"{equal} number{'s are' if equal != 1 else ' is'} equal.")
    if omitted := len(comparison.numbers) - len(differing) - equal:
        lines.append(f"{omitted} more number{'s are' if omitted != 1 else ' is'} on the page.")
    lines += [wrap(f"note: {note}") for note in comparison.notes]
    return "\n".join([*lines, str(page)])


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Align the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [f"{row[0]:<{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in rows
    ]
