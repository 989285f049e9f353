"""Tests of progress on terminals of any width, on plain output and on closed pipes."""

import io
from contextlib import redirect_stderr

import pytest
from rich.console import Console

from stages.runtime.context import Reporter
from stages.tracking.console import CompositeReporter, ConsoleReporter
from stages.tracking.quantities import RateEstimator


class Clock:
    """Clock that a test sets."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def plain_reporter(clock=None):
    """Return a reporter without a terminal, and the file it prints to."""
    console = Console(file=io.StringIO(), force_terminal=False)
    return ConsoleReporter("vqvae", console, clock or Clock()), console.file


def test_plain_lines_are_printed_at_intervals():
    """Without a terminal there is a first line, one every ten seconds and a last one, without control characters."""
    clock = Clock()
    progress, file = plain_reporter(clock)
    with progress:
        for step in range(1, 101):
            progress.progress(step, 100, "step", {"loss": 1 / step})
            clock.now += 0.25

    lines = file.getvalue().splitlines()
    assert lines[0] == "vqvae: 1/100 steps  1%  loss 1"
    assert lines[1] == "vqvae: 41/100 steps  41%  15 s left  4 steps/s  loss 0.02439"
    assert lines[-1] == "vqvae: 100/100 steps  100%  4 steps/s  loss 0.01"
    assert len(lines) == 4 and "\x1b" not in file.getvalue()


def test_new_unit_prints_a_line_and_resets_the_rate():
    """A stage that starts to count another unit prints a line at once, without a rate."""
    clock = Clock()
    progress, file = plain_reporter(clock)
    progress.progress(5, 10, "image", {})
    clock.now += 1
    progress.progress(1, 10, "step", {})
    assert file.getvalue().splitlines() == ["vqvae: 5/10 images  50%", "vqvae: 1/10 steps  10%"]


def test_end_is_printed_once():
    """Reports after the last step add no lines."""
    progress, file = plain_reporter()
    for _ in range(5):
        progress.progress(10, 10, "step", {})
    assert len(file.getvalue().splitlines()) == 1


@pytest.mark.parametrize("done, total", [(0, 0), (5, 0), (20, 10), (-1, 10)])
def test_invalid_counts_print_a_line(done, total):
    """A total of zero, more than the total, or a negative count still print a line."""
    progress, file = plain_reporter()
    progress.progress(done, total, "step", {})
    assert file.getvalue().count("\n") == 1


def test_rate_is_zero_while_unknown():
    """After a restart from a checkpoint, or if the clock has not advanced, the rate is zero and never negative."""
    clock = Clock()
    estimator = RateEstimator(clock)
    for done in (10, 20):
        estimator.update(done)
    assert estimator.rate == 0
    clock.now += 2
    estimator.update(30)
    assert estimator.rate == 10
    estimator.update(5)
    assert estimator.rate == 0
    clock.now += 1
    estimator.update(8)
    assert estimator.rate == 3


def test_rate_covers_the_last_minute():
    """A slow start does not count after a minute."""
    clock = Clock()
    estimator = RateEstimator(clock)
    for done in range(200):
        clock.now += 10 if done < 10 else 1
        estimator.update(done)
    assert estimator.rate == pytest.approx(1)


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_bar_fits_any_width(width):
    """On a terminal, progress is one line that never wraps, and has no colour if NO_COLOR is set."""
    environment = {"NO_COLOR": "1", "TERM": "xterm"}
    console = Console(file=io.StringIO(), force_terminal=True, width=width, legacy_windows=False, _environ=environment)
    progress = ConsoleReporter("prior_bottom", console)
    progress.progress(120, 1500, "step", {"nll": 3.21, "bits": 4.63})
    with console.capture() as capture:
        console.print(progress)
    lines = capture.get().splitlines()
    assert len(lines) == 1 and len(lines[0]) <= width
    assert "prior_bottom" in lines[0]
    assert "\x1b[3" not in lines[0]


def test_dumb_terminal_gets_plain_lines():
    """With TERM=dumb there are no control characters, and markup in a message is printed as text."""
    console = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    with ConsoleReporter("vqvae", console) as progress:
        progress.progress(1, 2, "step", {})
        progress.message("[red]literal[/red]")
    assert console.file.getvalue().splitlines() == ["vqvae: 1/2 steps  50%", "vqvae: [red]literal[/red]"]


def test_message_is_printed_above_the_bar():
    """On a terminal, a message is a line of its own."""
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with ConsoleReporter("vqvae", console) as progress:
        progress.progress(1, 2, "step", {})
        progress.message("checkpoint at step 1")
    assert "vqvae: checkpoint at step 1" in console.file.getvalue()


def test_composite_reporter_forwards_to_all():
    """Both reporters receive every report, in the same order."""
    calls = []

    class RecordingReporter(Reporter):
        def progress(self, *arguments):
            calls.append(arguments)

        metrics = image = message = progress

    composite = CompositeReporter([RecordingReporter(), RecordingReporter()])
    composite.progress(1, 2, "step", {})
    composite.metrics({"loss": 1.0}, 1)
    composite.image("grid", b"", 1)
    composite.message("done")
    assert len(calls) == 8 and calls[::2] == calls[1::2]


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), BrokenPipeError(32, "Broken pipe")])
def test_closed_terminal_does_not_stop_the_run(error):
    """After a logout the run goes on, although it can no longer print."""

    class ClosedTerminal(io.StringIO):
        def write(self, text):
            raise error

    with redirect_stderr(ClosedTerminal()), ConsoleReporter("vqvae") as progress:
        progress.message("checkpoint at step 1")
        progress.progress(1, 2, "step", {})
