"""Tests of numbers, rates and durations for people."""

import math

import pytest

from stages.tracking.quantities import (
    ProgressState,
    RateEstimator,
    format_duration,
    format_number,
    format_rate,
)

NUMBERS = {
    "1,250": 1250.0,
    "1,234,568": 1_234_567.8,
    "12.35": 12.3456,
    "0.01235": 0.0123456,
    "0": 0.0,
    "0.00001": 0.00001,
    "-1,250": -1250.4,
    "2.5e-09": 2.5e-9,
    "inf": math.inf,
    "nan": math.nan,
}
RATES = {
    "1,250 images/s": (1250.0, "images"),
    "3.21 steps/s": (3.21, "step"),
    "2.5 s per step": (0.4, "step"),
    "1 min 40 s per image": (0.01, "images"),
}
DURATIONS = {
    "0 s": 0.2,
    "45 s": 45,
    "1 min": 59.6,
    "3 min 5 s": 185,
    "1 h": 3600,
    "1 h 12 min": 4320,
    "2 d 2 h": 180_000,
}


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers_have_separators_and_no_exponent(text):
    """Only numbers below a millionth have an exponent."""
    assert format_number(NUMBERS[text]) == text


@pytest.mark.parametrize("text", RATES)
def test_slow_rates_are_durations(text):
    """Below one per second, the duration of one unit is shown."""
    assert format_rate(*RATES[text]) == text


@pytest.mark.parametrize("text", DURATIONS)
def test_durations_have_two_units(text):
    """Smaller units do not matter beside the two largest."""
    assert format_duration(DURATIONS[text]) == text


def test_progress_line_has_no_exponent():
    """Counts have separators, rates have units."""
    state = ProgressState(
        12_000, 150_000, "step", 5.0, {"loss": 0.012345, "images/s": 1250.0, "data %": 3.14, "memory GB": 12.3}
    )
    assert state.fields() == [
        "12,000/150,000 steps",
        "8%",
        "7 h 40 min left",
        "5 steps/s",
        "loss 0.01235",
        "1,250 images/s",
        "data 3.1%",
        "memory 12 GB",
    ]


def test_rate_of_reports_that_arrive_together_is_unknown():
    """Their times differ by the transport, not by the work: 1,597 steps per second were shown for eight steps."""
    times = iter([0.0, 0.004, 0.6])
    rate = RateEstimator(lambda: next(times))
    rate.update(2)
    rate.update(8)
    assert rate.rate == 0
    rate.update(14)
    assert rate.rate == pytest.approx(20)
