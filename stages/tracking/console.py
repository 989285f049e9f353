"""What a person sees of a run: a bar with rate and time left on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from stages.runtime.context import Reporter

PLAIN_LINE_INTERVAL_S = 10.0
RATE_WINDOW_S = 60.0


class CompositeReporter(Reporter):
    """Many reporters that hear the same."""

    def __init__(self, reporters: Iterable[Reporter]):
        self.reporters = tuple(reporters)

    def progress(self, done: float, total: float, unit: str, numbers: Mapping[str, float]) -> None:
        for reporter in self.reporters:
            reporter.progress(done, total, unit, numbers)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        for reporter in self.reporters:
            reporter.metrics(values, step)

    def picture(self, name: str, png: bytes, step: int) -> None:
        for reporter in self.reporters:
            reporter.picture(name, png, step)

    def note(self, text: str) -> None:
        for reporter in self.reporters:
            reporter.note(text)


@dataclass
class Pace:
    """How fast something advances, over the last minute; by a clock that cannot be set back."""

    clock: Callable[[], float] = time.monotonic
    marks: deque[tuple[float, float]] = field(default_factory=deque)  # (when, how much was done)

    def update(self, done: float) -> None:
        now = self.clock()
        if self.marks and done < self.marks[-1][1]:
            self.marks.clear()  # workers were restarted from a checkpoint
        self.marks.append((now, done))
        while len(self.marks) > 2 and now - self.marks[0][0] > RATE_WINDOW_S:
            self.marks.popleft()

    @property
    def rate(self) -> float:
        """Units per second; 0 while it cannot be told."""
        if len(self.marks) < 2:
            return 0.0
        (start, first), (end, last) = self.marks[0], self.marks[-1]
        return (last - first) / (end - start) if end > start else 0.0


@dataclass(frozen=True)
class ProgressState:
    """One look at a run."""

    done: float
    total: float
    unit: str
    rate: float
    numbers: Mapping[str, float]

    @property
    def fraction(self) -> float:
        return min(max(self.done / self.total, 0.0), 1.0) if self.total > 0 else 0.0

    def pieces(self) -> list[str]:
        """What can be said, most important first."""
        pieces = [f"{self.done:.0f}/{self.total:.0f} {self.unit}", f"{100 * self.fraction:.0f}%"]
        if self.rate > 0:
            if self.done < self.total:
                pieces.append(f"{_duration((self.total - self.done) / self.rate)} left")
            pieces.append(f"{self.rate:.3g}/s" if self.rate >= 1 else f"{1 / self.rate:.3g} s each")
        return pieces + [f"{name} {value:.4g}" for name, value in self.numbers.items()]


class _Console(Console):
    """Falls silent when nobody reads any more; of itself, rich would end the process, or the thread, with status 1."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class ConsoleReporter(Reporter):
    """Show a run's progress on stderr, or on another console. Use as a context manager."""

    def __init__(self, stage: str, console: Console | None = None, clock: Callable[[], float] = time.monotonic):
        self.stage = stage
        self.console = console or _Console(file=sys.stderr, highlight=False)
        self._clock = clock
        self._pace = Pace(clock)
        self._state: ProgressState | None = None
        self._shown_at = float("-inf")
        drawing = self.console.is_terminal and not self.console.is_dumb_terminal
        self._live = Live(self, console=self.console, refresh_per_second=4) if drawing else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            with suppress(OSError):
                self._live.stop()

    def progress(self, done: float, total: float, unit: str, numbers: Mapping[str, float]) -> None:
        before = self._state
        if before and before.unit != unit:
            self._pace = Pace(self._clock)
        self._pace.update(done)
        self._state = ProgressState(done, total, unit, self._pace.rate, dict(numbers))
        if self._live:
            return
        finished = done >= total and not (before and before.unit == unit and before.done >= before.total)
        due = self._clock() - self._shown_at >= PLAIN_LINE_INTERVAL_S
        if finished or due or before is None or before.unit != unit:
            self._shown_at = self._clock()
            self._line("  ".join(self._state.pieces()))

    def note(self, text: str) -> None:
        self._line(text)

    def _line(self, text: str) -> None:
        with suppress(OSError):  # nobody looks any more, as after a terminal has gone: no reason to stop
            self.console.print(f"{self.stage}: {text}", markup=False, highlight=False, soft_wrap=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw one line, however narrow: the bar shrinks, and the least important pieces go first."""
        if self._state is None:
            yield Text(f"{self.stage}: starting", overflow="ellipsis", no_wrap=True)
            return
        width = options.max_width
        text = self.stage
        for piece in self._state.pieces():
            if len(text) + 2 + len(piece) > width:
                break
            text += f"  {piece}"
        row = Table.grid(padding=(0, 1, 0, 0))
        cells: list[Text | ProgressBar] = [Text(text, overflow="ellipsis", no_wrap=True)]
        if (room := width - len(text) - 2) >= 8:
            cells.append(ProgressBar(total=1.0, completed=self._state.fraction, width=min(room, 40)))
        row.add_row(*cells)
        yield row


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
