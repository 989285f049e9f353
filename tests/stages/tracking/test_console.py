"""Progress can be read on any terminal, and without one."""

import io

import pytest
from rich.console import Console

from stages.runtime.context import Reporter
from stages.tracking.console import CompositeReporter, ConsoleReporter, Pace


class Clock:
    """A clock moved by hand."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def plain(clock=None, **options):
    console = Console(file=io.StringIO(), force_terminal=False, **options)
    return ConsoleReporter("vqvae", console, clock or Clock()), console.file


def test_without_a_terminal_a_plain_line_comes_now_and_then():
    """One line at first, one each ten seconds, one at the end: no more, and no control characters."""
    clock = Clock()
    progress, file = plain(clock)
    with progress:
        for step in range(1, 101):
            progress.progress(step, 100, "step", {"loss": 1 / step})
            clock.now += 0.25

    lines = file.getvalue().splitlines()
    assert lines[0] == "vqvae: 1/100 step  1%  loss 1"
    assert lines[1] == "vqvae: 41/100 step  41%  0:15 left  4/s  loss 0.02439"
    assert lines[-1] == "vqvae: 100/100 step  100%  4/s  loss 0.01"
    assert len(lines) == 4 and "\x1b" not in file.getvalue()


def test_another_unit_is_told_at_once():
    """When a stage goes on to count something else, a line says so and the pace starts anew."""
    clock = Clock()
    progress, file = plain(clock)
    progress.progress(5, 10, "image", {})
    clock.now += 1
    progress.progress(1, 10, "step", {})
    assert file.getvalue().splitlines() == ["vqvae: 5/10 image  50%", "vqvae: 1/10 step  10%"]


def test_the_end_is_told_once():
    """Reports after the last step add no lines."""
    progress, file = plain()
    for _ in range(5):
        progress.progress(10, 10, "step", {})
    assert len(file.getvalue().splitlines()) == 1


@pytest.mark.parametrize("done, total", [(0, 0), (5, 0), (20, 10), (-1, 10)])
def test_odd_counts_do_no_harm(done, total):
    """Nothing to do, too much done or less than nothing still give a line."""
    progress, file = plain()
    progress.progress(done, total, "step", {})
    assert file.getvalue().count("\n") == 1


def test_a_rate_is_never_negative():
    """A restart from a checkpoint, or a clock that stands still, gives no rate rather than a false one."""
    clock = Clock()
    pace = Pace(clock)
    for done in (10, 20):
        pace.update(done)
    assert pace.rate == 0
    clock.now += 2
    pace.update(30)
    assert pace.rate == 10
    pace.update(5)
    assert pace.rate == 0
    clock.now += 1
    pace.update(8)
    assert pace.rate == 3


def test_the_pace_is_that_of_the_last_minute():
    """What happened long ago, such as a slow start, is forgotten."""
    clock = Clock()
    pace = Pace(clock)
    for done in range(200):
        clock.now += 10 if done < 10 else 1
        pace.update(done)
    assert pace.rate == pytest.approx(1)


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_a_bar_fits_any_terminal(width, monkeypatch):
    """On a terminal, progress is one line that never wraps, without colour if asked."""
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    console = Console(file=io.StringIO(), force_terminal=True, width=width, legacy_windows=False)
    progress = ConsoleReporter("prior@bottom", console)
    progress.progress(120, 1500, "step", {"nll": 3.21, "bits": 4.63})
    with console.capture() as capture:
        console.print(progress)
    lines = capture.get().splitlines()
    assert len(lines) == 1 and len(lines[0]) <= width
    assert "prior@bottom" in lines[0]
    assert "\x1b[3" not in lines[0]


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    """TERM=dumb means no control characters."""
    monkeypatch.setenv("TERM", "dumb")
    console = Console(file=io.StringIO(), force_terminal=True)
    with ConsoleReporter("vqvae", console) as progress:
        progress.progress(1, 2, "step", {})
        progress.note("[red]as it is[/red]")
    assert console.file.getvalue().splitlines() == ["vqvae: 1/2 step  50%", "vqvae: [red]as it is[/red]"]


def test_notes_stand_above_a_running_bar():
    """A note on a terminal is a line of its own."""
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with ConsoleReporter("vqvae", console) as progress:
        progress.progress(1, 2, "step", {})
        progress.note("checkpoint at step 1")
    assert "vqvae: checkpoint at step 1" in console.file.getvalue()


def test_several_reporters_hear_the_same():
    """Each report reaches each reporter."""
    not_ignored = []

    class Listener(Reporter):
        def progress(self, *arguments):
            not_ignored.append(arguments)

        metrics = picture = note = progress

    several = CompositeReporter([Listener(), Listener()])
    several.progress(1, 2, "step", {})
    several.metrics({"loss": 1.0}, 1)
    several.picture("grid", b"", 1)
    several.note("done")
    assert len(not_ignored) == 8 and not_ignored[::2] == not_ignored[1::2]


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), BrokenPipeError(32, "Broken pipe")])
def test_a_terminal_that_is_gone_is_no_reason_to_stop(monkeypatch, error):
    """Who logs out leaves a run behind; what it says from then on, the journal alone hears."""

    class Gone(io.StringIO):
        def write(self, text):
            raise error

    monkeypatch.setattr("sys.stderr", Gone())
    with ConsoleReporter("vqvae") as progress:
        progress.note("Still here.")
        progress.progress(1, 2, "step", {})
