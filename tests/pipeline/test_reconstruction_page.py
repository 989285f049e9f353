"""Tests of the report of a VQ-VAE that does not quantize."""

from pathlib import Path

import pytest

from pipeline import reconstruction_page
from stages.errors import UserError
from stages.formats import model_file


def test_report_shows_reconstructions_numbers_and_curves(tmp_path: Path):
    """The page embeds the sheet, and has the last numbers of each split and one chart per metric."""
    rows = [
        {"step": step, "name": f"{split}/{metric}", "value": value}
        for step, value in ((1, 0.5), (2, 0.25))
        for split in ("train", "validation")
        for metric in ("psnr", "mse")
    ]
    meta = {"image_size": 16, "grids": {"top": 4, "bottom": 8}}
    model_file.write(tmp_path / "vqvae", "vqvae", {}, meta, history=rows, images={"reconstructions": b"PNG"})
    page = reconstruction_page.write(tmp_path / "vqvae", tmp_path / "runs" / "report.html").read_text(encoding="utf-8")
    assert "top 4 x 4, bottom 8 x 8" in page and "base64,UE5H" in page
    assert page.count("<td>0.25</td>") == 4 and page.count("<svg") == 2


def test_report_of_a_missing_vqvae_is_refused(tmp_path: Path):
    """The error names the stage that trains it."""
    with pytest.raises(UserError, match="vqvae2 run --stage vqvae"):
        reconstruction_page.write(tmp_path / "vqvae", tmp_path / "report.html")
