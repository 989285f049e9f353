"""Rates, against the paper's own arithmetic."""

import math

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from stages.metrics import rate


def test_the_papers_compression_factors():
    """At 256 pixels, 512 entries: 42.67 for the bottom codes alone, 34.13 with the top ones, 0.703 bits per pixel."""
    top, bottom = rate.fixed_bits(512, 32 * 32), rate.fixed_bits(512, 64 * 64)
    assert rate.summarize_bits(bottom, 256)["compression"] == pytest.approx(42.67, abs=0.005)
    both = rate.summarize_bits(top + bottom, 256)
    assert both["compression"] == pytest.approx(34.13, abs=0.005)
    assert both["bits_per_pixel"] == pytest.approx(0.703, abs=0.0005)
    assert both["bits_per_dimension"] == pytest.approx(0.2344, abs=0.00005)


def test_the_uniform_prior_costs_the_constant_kl():
    """5120 codes out of 512 entries are 5120 ln 512 = 31,940 nats, whatever the weights."""
    assert rate.fixed_bits(512, 5120) * math.log(2) == pytest.approx(31_940, abs=1)


def test_likelihoods_of_parts_add_up_and_divide_once():
    """NLL per code, its unit in bits, and its standard error do not depend on how images were shared out."""
    nats = np.random.default_rng(0).gamma(9.0, 2.0, 11)
    parts = rate.summarize(rate.add([rate.measure(nats[:8], 4), rate.measure(nats[8:], 4)]))
    assert parts["nats_per_code"] == pytest.approx(nats.mean() / 4)
    assert parts["bits_per_code"] == pytest.approx(nats.mean() / 4 / math.log(2))
    assert parts["nats_per_code_se"] == pytest.approx(nats.std(ddof=1) / math.sqrt(11) / 4)


def test_pixel_bits_bound_a_known_gaussian():
    """With no codes and a residual of known variance, the bound is that Gaussian's own entropy, in 8-bit levels."""
    sigma = 9.0
    residual = np.random.default_rng(0).normal(0, sigma, 200_000)
    entropy = -np.mean(-0.5 * (residual / sigma) ** 2 - math.log(sigma * math.sqrt(2 * math.pi))) / math.log(2)
    mse = np.square(residual / 127.5).mean()
    assert rate.pixel_bits_per_dimension(mse, 0, 32) == pytest.approx(entropy, abs=0.01)


def test_pixel_bits_of_the_papers_numbers():
    """MSE 0.0050 and 46,080 bits of codes at 256 pixels: 5.22 + 0.2344 bits per dimension."""
    assert rate.pixel_bits_per_dimension(0.0050, 46_080, 256) == pytest.approx(5.22 + 0.2344, abs=0.01)


def test_a_learnt_prior_never_costs_more_than_it_says():
    """The bound with a uniform prior lies above that with any prior whose NLL is below log2 K."""
    assert rate.pixel_bits_per_dimension(0.01, 9 * 100, 32) > rate.pixel_bits_per_dimension(0.01, 8.9 * 100, 32)


def test_columns_are_measured_in_the_files(tmp_path):
    """Each level's bytes come from its column; 64 entries take more than constant codes."""
    random = np.random.default_rng(0).integers(0, 64, (500, 16)).astype(np.uint16)
    table = pyarrow.table({"top": list(np.zeros((500, 16), np.uint16)), "bottom": list(random)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    sizes, rows = rate.column_bytes([tmp_path / "a.parquet"])
    assert rows == 500
    assert set(sizes) == {"top", "bottom"}
    assert sizes["bottom"] > 500 * 16 * 6 / 8 > sizes["top"]
    assert sum(sizes.values()) < (tmp_path / "a.parquet").stat().st_size
