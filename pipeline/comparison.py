"""Comparison of two runs: differing settings and paired metrics."""

import math
from dataclasses import dataclass

from pipeline import last_run
from pipeline.compared_runs import ComparedRun, Note
from pipeline.last_run import Change
from stages.tracking.quantities import format_number


@dataclass(frozen=True)
class MetricPair:
    """Metric of runs A and B; None if a run lacks it."""

    name: str
    a: float | None
    b: float | None

    @property
    def difference(self) -> float | None:
        """B minus A; None unless both have it."""
        return None if self.a is None or self.b is None else self.b - self.a

    def cells(self) -> tuple[str, str, str, str]:
        """Return the texts of A, B, their difference, and the difference relative to A."""
        a, b = ("-" if value is None else format_number(value) for value in (self.a, self.b))
        if self.difference is None or not math.isfinite(self.difference):
            return a, b, "", ""
        sign = "+" if self.difference > 0 else ""
        relative = _format_percent(100 * self.difference / abs(self.a)) if self.a and self.difference else ""
        return a, b, f"{sign}{format_number(self.difference, 3)}" if self.difference else "equal", relative


def _format_percent(percent: float) -> str:
    """Format with one decimal; a smaller difference with one digit that is not 0."""
    return f"{percent:+.1f}%" if abs(percent) >= 0.05 else f"{percent:+.1g}%"


@dataclass(frozen=True)
class Comparison:
    """Two runs, their differing settings and paired metrics."""

    a: ComparedRun
    b: ComparedRun
    settings: list[Change]
    numbers: list[MetricPair]

    @property
    def differing(self) -> list[MetricPair]:
        """Numbers of both runs that differ."""
        return [number for number in self.numbers if number.difference]  # NaN is true, too

    @property
    def equal(self) -> list[MetricPair]:
        """Numbers that are equal in both runs."""
        return [number for number in self.numbers if number.difference == 0]

    @property
    def notes(self) -> list[Note]:
        """Remarks on what is missing."""
        return [*self.a.notes, *self.b.notes]


def compare(a: ComparedRun, b: ComparedRun) -> Comparison:
    """Compare two runs: numbers that differ first, then equal ones, then those of one run only.

    Settings are compared only if both are known.
    """
    numbers = [MetricPair(name, a.numbers.get(name), b.numbers.get(name)) for name in {**a.numbers, **b.numbers}]
    numbers.sort(key=lambda number: (number.difference is None, number.difference == 0))
    have_settings = bool(a.settings and b.settings)
    return Comparison(a, b, last_run.compare(a.settings, b.settings) if have_settings else [], numbers)
