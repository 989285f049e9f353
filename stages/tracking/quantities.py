"""Numbers, rates, durations and progress, formatted for people: `1,250 images/s`, `1 h 12 min`."""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

RATE_WINDOW_S = 60.0
MIN_RATE_SPAN_S = 0.5  # reports of workers arrive in batches: a shorter span measures their transport
SIGNIFICANT_DIGITS = 4
UNITS = {"%": "%", "GB": " GB"}  # of a number, as the last word of its name
MIN_DECIMAL = 1e-6  # smaller numbers are written with an exponent


def format_number(value: float, digits: int = SIGNIFICANT_DIGITS) -> str:
    """Format a number with at least `digits` significant digits and thousands separators, without trailing zeros."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    if abs(value) < MIN_DECIMAL:
        return f"{value:.{digits}g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def format_rate(per_second: float, unit: str) -> str:
    """Format a rate of 1 or more as `3.2 steps/s`, and a lower one as `2.5 s per step`."""
    if per_second >= 1:
        return f"{format_number(per_second, 3)} {plural(unit)}/s"
    seconds = 1 / per_second
    text = f"{format_number(seconds, 3)} s" if seconds < 60 else format_duration(seconds)
    return f"{text} per {unit.removesuffix('s')}"


def format_named(name: str, value: float) -> str:
    """Format a number with its name, which may end in a unit: `1,250 images/s`, `data 3%`, `memory 2 GB`."""
    text, _, unit = name.rpartition(" ")
    if name.endswith("/s"):
        return f"{format_number(value)} {name}"
    if text and unit in UNITS:
        return f"{text} {format_number(value, 2)}{UNITS[unit]}"
    return f"{name} {format_number(value)}"


def format_duration(seconds: float) -> str:
    """Format a duration with its two largest units: `45 s`, `3 min 5 s`, `1 h 12 min`, `2 d 3 h`."""
    seconds = max(0, round(seconds))
    for size, unit, smaller_size, smaller_unit in (
        (86_400, "d", 3_600, "h"),
        (3_600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if seconds >= size:
            smaller = seconds % size // smaller_size
            return f"{seconds // size} {unit}" + (f" {smaller} {smaller_unit}" if smaller else "")
    return f"{seconds} s"


def plural(unit: str) -> str:
    """Return the plural of a unit that may be one already."""
    return unit if unit.endswith("s") else f"{unit}s"


@dataclass
class RateEstimator:
    """Rate of progress over the last RATE_WINDOW_S, measured by a monotonic clock."""

    clock: Callable[[], float] = time.monotonic
    history: deque[tuple[float, float]] = field(default_factory=deque)  # (time in seconds, units done)

    def update(self, done: float) -> None:
        now = self.clock()
        if self.history and done < self.history[-1][1]:
            self.history.clear()  # the workers were restarted from a checkpoint
        self.history.append((now, done))
        while len(self.history) > 2 and now - self.history[0][0] > RATE_WINDOW_S:
            self.history.popleft()

    @property
    def rate(self) -> float:
        """Units per second; 0 if it is unknown."""
        if len(self.history) < 2:
            return 0.0
        (start, first), (end, last) = self.history[0], self.history[-1]
        return (last - first) / (end - start) if end - start >= MIN_RATE_SPAN_S else 0.0


@dataclass(frozen=True)
class ProgressState:
    """Progress of a run at one moment."""

    done: float
    total: float
    unit: str
    rate: float  # units per second; 0 if it is unknown
    numbers: Mapping[str, float]

    @property
    def fraction(self) -> float:
        return min(max(self.done / self.total, 0.0), 1.0) if self.total > 0 else 0.0

    @property
    def remaining_s(self) -> float | None:
        """Estimated seconds to the end; None if unknown."""
        return max(0.0, self.total - self.done) / self.rate if self.rate > 0 else None

    @property
    def is_moving(self) -> bool:
        """Return whether the rate is known and units are left."""
        return self.rate > 0 and self.done < self.total

    @property
    def count(self) -> str:
        return f"{self.done:,.0f}/{self.total:,.0f} {plural(self.unit)}"

    @property
    def percentage(self) -> str:
        return f"{100 * self.fraction:.0f}%"

    @property
    def time_left(self) -> str:
        """Formatted time to the end; "" if unknown."""
        return "" if self.remaining_s is None else f"{format_duration(self.remaining_s)} left"

    @property
    def formatted_rate(self) -> str:
        """Formatted rate; "" if unknown."""
        return format_rate(self.rate, self.unit) if self.rate > 0 else ""

    def fields(self) -> list[str]:
        """Return the fields of a progress line, most important first."""
        time_left = self.time_left if self.done < self.total else ""
        return [
            *filter(None, (self.count, self.percentage, time_left, self.formatted_rate)),
            *(format_named(name, value) for name, value in self.numbers.items()),
        ]
