"""The page: everything inside, nothing asked for, and readable on a phone."""

import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from models.priors import Grid
from stages.config import EvaluateConfig
from stages.evaluation import summary
from stages.evaluation.report import Report, render, write_report
from stages.metrics import COMPARISONS, Comparison
from stages.metrics.distortion import DistortionSums
from stages.metrics.rate import LikelihoodSums

LEVELS = {"top": Grid(16, 2, 2), "bottom": Grid(32, 4, 4)}
NETWORK = "efficientnet_lite0"


def report(side: int = 16, name: str = "cats & dogs") -> Report:
    """A report of random pictures and numbers."""
    generator = np.random.default_rng(0)

    def images(count: int) -> np.ndarray:
        return generator.integers(0, 256, (count, side, side, 3), dtype=np.uint8)

    features = {set_: generator.normal(size=(9, 5)) for set_ in ("reference", *SETS)}
    counts = {
        level: {split: generator.integers(0, 9, grid.entries) for split in ("train", "validation")}
        for level, grid in LEVELS.items()
    }
    parts = ("top/zeros", "top/mean", "top+bottom/zeros")
    reconstruction = summary.reconstruction(
        {split: {part: DistortionSums(9, 9 * side * side * 3, 60.0, 4.5) for part in parts} for split in counts["top"]}
    )
    likelihood = summary.likelihood(
        {level: {split: LikelihoodSums(9, 36, 90.0, 950.0) for split in counts["top"]} for level in LEVELS}, LEVELS
    )
    distances = {
        space: {of: generator.random(9) for of in ("samples", "validation")} for space in ("pixels", "features")
    }
    numbers = {
        "seed": 0,
        "reference": "validation",
        "num_images": {"train": 20, "validation": 9, "samples": 9, "compared": 9},
        "reconstruction": reconstruction,
        "codebook": summary.codebook(counts),
        "likelihood": likelihood,
        "rate": summary.rates(
            LEVELS,
            likelihood,
            0.01,
            split="validation",
            image_size=side,
            column_bytes={"top": 100, "bottom": 200},
            rows=20,
        ),
        "compared": summary.comparisons(
            {set_: (features["reference"], features[set_]) for set_ in SETS}, NETWORK, EvaluateConfig(), 0
        ),
        "neighbours": summary.memorization(distances),
    }
    numbers["compared"] |= summary.ratios(numbers["compared"], NETWORK)
    return Report(
        numbers=numbers,
        notes=["Level top is <collapsed>."],
        network=NETWORK,
        image_size=side,
        levels=LEVELS,
        originals=images(8),
        reconstructions={part: images(8) for part in parts},
        samples={name: images(8), "birds": images(3)},
        nearest=[(images(1)[0], images(2), images(2)) for _ in range(3)],
        distances=distances,
        counts=counts,
        curves={"VQ-VAE": [(step, f"{split}/mse", 1 / step) for step in (1, 2) for split in ("train", "validation")]},
        settings={"seed": 0},
        digests={"shards": "0" * 64},
    )


SETS = ("samples", "samples_to_reconstructions", "reconstructions", "random_codes", "shuffled_codes")


class Page(HTMLParser):
    """What a page refers to, what its images are called, and its words."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.ids: list[str | None] = []
        self.tags: set[str] = set()
        self.words = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.add(tag)
        self.references += [found[name] for name in ("src", "href", "xlink:href", "srcset", "data") if name in found]
        self.ids += [found["id"]] if "id" in found else []
        if tag in ("img", "svg"):
            self.images.append(found)

    def handle_data(self, data):
        self.words += data


@pytest.fixture(scope="module")
def html() -> str:
    return render(report())


def test_nothing_is_asked_of_anybody(html):
    """Every reference is data inside the page or a place in it; there is no script, and no address in a style."""
    page = Page(html)
    assert page.references and all(found.startswith(("data:image/png;base64,", "#")) for found in page.references)
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    assert not re.search(r"url\((?!#)|@import", html)


def test_every_picture_says_what_it_shows(html):
    """Images have words for those who cannot see them, and so have charts."""
    page = Page(html)
    assert len(page.images) > 10
    assert all(found.get("alt") or found.get("aria-label") for found in page.images)


def test_ids_are_unique(html):
    """Charts drawn apart do not use each other's pieces."""
    ids = Page(html).ids
    assert len(ids) == len(set(ids)) > 0


def test_names_from_data_are_text():
    """A class called like a tag is shown, not obeyed."""
    page = Page(render(report(name="<script>alert(1)</script>")))
    assert "script" not in page.tags
    assert "<script>alert(1)</script>" in page.words


def test_numbers_stand_with_their_number_of_images_and_their_network(html):
    """KID carries the network, N, its error and which way is better; both controls stand in the same table."""
    words = Page(html).words
    for expected in (NETWORK, "KID (lower is better)", "random codes, decoded", "shuffled codes, decoded", "nats/code"):
        assert expected in words
    assert re.search(r"0\.\d{4} ± 0\.\d{4}", words)


def test_measures_that_were_left_out_leave_a_dash():
    """A single image has no KID; the page still says all else."""
    found = report()
    numbers = dict(found.numbers)
    numbers["compared"] = {name: {"images": 1, "reference_images": 1} for name in SETS}
    assert "–" in Page(render(replace(found, numbers=numbers))).words


def test_another_comparison_is_one_line(monkeypatch):
    """A line in the table is measured on every set and shown on the page, with the way that is better."""
    gap = Comparison("Gap of means", "lower", lambda config: 1, lambda a, b, config, seed: float(a.mean() - b.mean()))
    monkeypatch.setitem(COMPARISONS, "gap", gap)
    found = report()
    assert all(f"gap_{NETWORK}" in found.numbers["compared"][name] for name in SETS)
    assert "Gap of means (lower is better)" in Page(render(found)).words


def test_large_images_stay_below_five_megabytes(tmp_path):
    """Images of 256 pixels of noise, the worst there is, are reduced on the page and whole beside it."""
    written = write_report(tmp_path, report(side=256))
    assert (tmp_path / "report.html").stat().st_size < 5_000_000
    assert set(written) == {path.stem for path in tmp_path.glob("*.png")} == {"samples", "reconstructions", "nearest"}


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium on the path")
def test_a_browser_asks_for_nothing_and_fits_the_page_on_a_phone(tmp_path):
    """Chromium opens the page at 360 pixels: one file is read, and nothing is wider than the screen."""
    write_report(tmp_path, report())
    frame = tmp_path / "frame.html"
    measure = "document.title = frame.contentDocument.documentElement.scrollWidth"
    frame.write_text(f'<iframe id="frame" width="360" height="900" src="report.html" onload="{measure}"></iframe>')
    found = _chromium(tmp_path, frame, "--allow-file-access-from-files", "--dump-dom")
    assert 300 < int(re.search(r"<title>(\d+)</title>", found)[1]) <= 360

    blank, asking = tmp_path / "blank.html", tmp_path / "asking.html"
    blank.write_text("<p>Nothing.</p>")
    asking.write_text('<img src="http://report.invalid/picture.png">')
    own = _asked(tmp_path, blank)  # a browser asks for some things on its own account
    assert "report.invalid" in _asked(tmp_path, asking)
    assert _asked(tmp_path, tmp_path / "report.html") <= own


def _asked(folder: Path, page: Path) -> set[str]:
    """Open a page, and name the hosts that were asked for anything."""
    log = folder / "net.json"
    _chromium(folder, page, f"--log-net-log={log}", "--dump-dom")
    return set(re.findall(r'"url":"https?://([^/"]+)', log.read_text()))


def _chromium(folder: Path, page: Path, *flags: str) -> str:
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", *quiet]
    command += [f"--user-data-dir={folder / 'profile'}", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
