"""Rates against the arithmetic of the paper."""

import math

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from stages.metrics import rate


def test_compression_factors_equal_the_papers():
    """256 x 256 pixels, 512 entries: 42.67 for the bottom codes, 34.13 and 0.703 bits per pixel for both levels."""
    top, bottom = rate.fixed_bits(512, 32 * 32), rate.fixed_bits(512, 64 * 64)
    assert rate.summarize_bits(bottom, 256)["compression"] == pytest.approx(42.67, abs=0.005)
    both = rate.summarize_bits(top + bottom, 256)
    assert both["compression"] == pytest.approx(34.13, abs=0.005)
    assert both["bits_per_pixel"] == pytest.approx(0.703, abs=0.0005)
    assert both["bits_per_dimension"] == pytest.approx(0.2344, abs=0.00005)


def test_fixed_bits_equal_the_kl_of_a_uniform_prior():
    """5120 codes of 512 entries are 5120 ln 512 = 31,940 nats."""
    assert rate.fixed_bits(512, 5120) * math.log(2) == pytest.approx(31_940, abs=1)


def test_nll_of_added_parts_equals_that_of_all_images():
    """NLL per code in nats and in bits, and its standard error, do not depend on how images are split into parts."""
    nats = np.random.default_rng(0).gamma(9.0, 2.0, 11)
    summary = rate.summarize(rate.add([rate.measure(nats[:8], 4), rate.measure(nats[8:], 4)]))
    assert summary["nats_per_code"] == pytest.approx(nats.mean() / 4)
    assert summary["bits_per_code"] == pytest.approx(nats.mean() / 4 / math.log(2))
    assert summary["nats_per_code_se"] == pytest.approx(nats.std(ddof=1) / math.sqrt(11) / 4)


def test_pixel_bits_of_a_gaussian_residual_are_its_entropy():
    """Without codes, and with a Gaussian residual, the bound is the entropy of that Gaussian in 8-bit levels."""
    sigma = 9.0
    residual = np.random.default_rng(0).normal(0, sigma, 200_000)
    entropy = -np.mean(-0.5 * (residual / sigma) ** 2 - math.log(sigma * math.sqrt(2 * math.pi))) / math.log(2)
    mse = np.square(residual / 127.5).mean()
    assert rate.pixel_bits_per_dimension(mse, 0, 32) == pytest.approx(entropy, abs=0.01)


def test_pixel_bits_of_the_papers_mse():
    """MSE 0.0050 and 46,080 bits of codes at 256 pixels: 5.22 + 0.2344 bits per dimension."""
    assert rate.pixel_bits_per_dimension(0.0050, 46_080, 256) == pytest.approx(5.22 + 0.2344, abs=0.01)


def test_pixel_bits_decrease_with_the_bits_of_the_codes():
    """A prior with fewer bits per code than a uniform prior gives a lower bound."""
    assert rate.pixel_bits_per_dimension(0.01, 9 * 100, 32) > rate.pixel_bits_per_dimension(0.01, 8.9 * 100, 32)


def test_column_bytes_are_those_of_the_files(tmp_path):
    """Each level has the bytes of its own column: codes of 64 entries need more than constant codes."""
    random = np.random.default_rng(0).integers(0, 64, (500, 16)).astype(np.uint16)
    table = pyarrow.table({"top": list(np.zeros((500, 16), np.uint16)), "bottom": list(random)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    sizes, rows = rate.column_bytes([tmp_path / "a.parquet"])
    assert rows == 500
    assert set(sizes) == {"top", "bottom"}
    assert sizes["bottom"] > 500 * 16 * 6 / 8 > sizes["top"]
    assert sum(sizes.values()) < (tmp_path / "a.parquet").stat().st_size
