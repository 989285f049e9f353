"""Progress of a run on the console: a bar with rate and time left on a terminal, otherwise occasional plain lines."""

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Self

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from stages.runtime.context import Reporter
from stages.tracking.quantities import ProgressState, RateEstimator

PLAIN_LINE_INTERVAL_S = 10.0


class CompositeReporter(Reporter):
    """Reporter that forwards every report to several reporters."""

    def __init__(self, reporters: Iterable[Reporter]):
        self.reporters = tuple(reporters)

    def progress(self, done: float, total: float, unit: str, numbers: Mapping[str, float]) -> None:
        for reporter in self.reporters:
            reporter.progress(done, total, unit, numbers)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        for reporter in self.reporters:
            reporter.metrics(values, step)

    def image(self, name: str, png: bytes, step: int) -> None:
        for reporter in self.reporters:
            reporter.image(name, png, step)

    def message(self, text: str) -> None:
        for reporter in self.reporters:
            reporter.message(text)


class _Console(Console):
    """Console that stops printing when its pipe is closed. The base class would end the process with status 1."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class ConsoleReporter(Reporter):
    """Reporter that shows progress and messages on stderr or another console. Use it as a context manager."""

    def __init__(self, stage: str, console: Console | None = None, clock: Callable[[], float] = time.monotonic):
        self.stage = stage
        self.console = console or _Console(file=sys.stderr, highlight=False)
        self._clock = clock
        self._rate = RateEstimator(clock)
        self._state: ProgressState | None = None
        self._last_line_s = float("-inf")
        is_interactive = self.console.is_terminal and not self.console.is_dumb_terminal
        self._live = Live(self, console=self.console, refresh_per_second=4) if is_interactive else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            with suppress(OSError):
                self._live.stop()

    def progress(self, done: float, total: float, unit: str, numbers: Mapping[str, float]) -> None:
        previous = self._state
        if previous and previous.unit != unit:
            self._rate = RateEstimator(self._clock)
        self._rate.update(done)
        self._state = ProgressState(done, total, unit, self._rate.rate, dict(numbers))
        if self._live:
            return
        finished = done >= total and not (previous and previous.unit == unit and previous.done >= previous.total)
        due = self._clock() - self._last_line_s >= PLAIN_LINE_INTERVAL_S
        if finished or due or previous is None or previous.unit != unit:
            self._last_line_s = self._clock()
            self._print("  ".join(self._state.fields()))

    def message(self, text: str) -> None:
        self._print(text)

    def _print(self, text: str) -> None:
        with suppress(OSError):  # the terminal is gone, as after a logout; the run must go on
            self.console.print(f"{self.stage}: {text}", markup=False, highlight=False, soft_wrap=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw one line of any width: the bar shrinks, and the least important fields are left out."""
        if self._state is None:
            yield Text(f"{self.stage}: starting", overflow="ellipsis", no_wrap=True)
            return
        width = options.max_width
        text = self.stage
        for column in self._state.fields():
            if len(text) + 2 + len(column) > width:
                break
            text += f"  {column}"
        row = Table.grid(padding=(0, 1, 0, 0))
        cells: list[Text | ProgressBar] = [Text(text, overflow="ellipsis", no_wrap=True)]
        if (room := width - len(text) - 2) >= 8:
            cells.append(ProgressBar(total=1.0, completed=self._state.fraction, width=min(room, 40)))
        row.add_row(*cells)
        yield row
