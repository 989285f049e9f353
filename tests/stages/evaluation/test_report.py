"""Report page: self-contained, without requests, and readable on a phone."""

import base64
import csv
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from models.priors import Grid
from stages.config import EvaluateConfig
from stages.evaluation import ladder, summary
from stages.evaluation.inputs import EvaluationPlan
from stages.evaluation.pictures import picture, picture_list
from stages.evaluation.plots import write_plots
from stages.evaluation.report import render, write_report
from stages.evaluation.report_data import NearestImages, ReportData, SamplesOfClass
from stages.metrics import codecs
from stages.metrics.distortion import DistortionSums
from stages.metrics.networks import Network
from stages.metrics.rate import LikelihoodSums
from stages.metrics.set_metrics import SET_METRICS, SetMetric

LEVELS = {"top": Grid(16, 2, 2), "bottom": Grid(32, 4, 4)}
NETWORK = Network("efficientnet_lite0", "installed", "0" * 64)
CURVES = {"VQ-VAE": ["mse", "psnr"], "Prior of level top": ["nll_nats_per_code", "nll_bits_per_code"]}
PROVENANCE = "../../runs/evaluate/0123/provenance.js"
RUNGS = ("originals", "reconstructions", "redrawn_bottom", "samples", "random_codes")
SETS = ("samples", "samples_to_reconstructions", "reconstructions", "random_codes", "shuffled_codes")


def report_data(side: int = 16, class_name: str = "cats & dogs") -> ReportData:
    """Create a report of random images and metrics."""
    generator = np.random.default_rng(0)

    def images(count: int) -> np.ndarray:
        return generator.integers(0, 256, (count, side, side, 3), dtype=np.uint8)

    features = {name: generator.normal(size=(9, 5)) for name in ("reference", *SETS)}
    counts = {
        level: {split: generator.integers(0, 9, grid.entries) for split in ("train", "validation")}
        for level, grid in LEVELS.items()
    }
    prefixes = ("top/zeros", "top/mean", "top+bottom/zeros")
    drawn = ("top/prior", "top/mode")
    reconstruction = summary.reconstruction(
        {
            split: {prefix: DistortionSums(9, 9 * side * side * 3, 60.0, 4.5, 250.0) for prefix in prefixes}
            for split in counts["top"]
        }
    )
    likelihood = summary.likelihood(
        {level: {split: LikelihoodSums(9, 36, 90.0, 950.0) for split in counts["top"]} for level in LEVELS}, LEVELS
    )
    distances = {
        space: {image_set: generator.random(9) for image_set in ("samples", "validation")}
        for space in ("pixels", "features")
    }
    metrics = {
        "seed": 0,
        "reference": "validation",
        "num_images": {"train": 20, "validation": 9, "samples": 42, "compared": 9},
        "sampling": {"temperature": 0.7, "top_k": 0, "top_p": 0.9, "accepted": 1.0},
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
            {name: (features["reference"], features[name]) for name in SETS}, NETWORK, EvaluateConfig(), 0
        ),
        "neighbours": summary.memorization(distances, 20),
    }
    rung_features = {**features, "redrawn_bottom": features["samples"]}
    plan = EvaluationPlan(
        ("reference",), {}, 9, 9, 8, 9, 4, ("bottom",), (NETWORK,), EvaluateConfig(precision_recall_k=2), 0
    )
    metrics["ladder"] = ladder.metrics(rung_features.__getitem__, plan, LEVELS, NETWORK)
    codec_sums = codecs.measure(images(2), "jpeg", 50)
    metrics["rate_distortion"] = [
        *summary.rate_distortion(metrics["rate"], reconstruction["validation"], list(LEVELS)),
        *summary.codec_rate_distortion({"jpeg/50": codec_sums, "webp/50": codec_sums}, side),
    ]
    metrics["compared"] |= summary.kid_ratios(metrics["compared"], NETWORK)
    return ReportData(
        metrics=metrics,
        notes=["Level top is <collapsed>."],
        networks=[NETWORK],
        image_size=side,
        levels=LEVELS,
        originals=images(8),
        reconstructions={prefix: images(8) for prefix in (*prefixes[:2], *drawn, prefixes[2])},
        samples={class_name: SamplesOfClass(images(12), 12), "birds": SamplesOfClass(images(3), 30)},
        rungs={name: images(8) for name in RUNGS},
        codebooks={level: images(grid.entries)[:, :8, :8] for level, grid in LEVELS.items()},
        nearest=[NearestImages(images(1)[0], {"pixels": images(2), "features": images(2)}) for _ in range(3)],
        nearest_distances=distances,
        entry_counts=counts,
        curves={
            model: [
                (step, f"{split}/{metric}", 1 / step)
                for step in (1, 2)
                for split in ("train", "validation")
                for metric in metrics
            ]
            for model, metrics in CURVES.items()
        },
        origin={"Dataset": "shades: 29 images", "Sampling": "42 samples, temperature 0.7, no top-k, top-p 0.9"},
        provenance=PROVENANCE,
        settings={"seed": 0},
        digests={"shards": "0" * 64},
    )


class Page(HTMLParser):
    """References, images, ids, tags and text of an HTML page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.ids: list[str | None] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.add(tag)
        names = ("src", "href", "xlink:href", "srcset", "data")
        self.references += [attributes[name] for name in names if name in attributes]
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag in ("img", "svg"):
            self.images.append(attributes)

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def html() -> str:
    return render(report_data())


def test_page_makes_no_requests(html):
    """Each reference is embedded data, an id on the page, or the local script; there are no URLs in styles."""
    page = Page(html)
    internal = ("data:image/png;base64,", "data:image/webp;base64,", "#")
    external = [reference for reference in page.references if not reference.startswith(internal)]
    assert external == [PROVENANCE]
    assert not page.tags & {"link", "iframe", "object", "embed", "base", "form"}
    assert not re.search(r"url\((?!#)|@import", html)


def test_contents_list_names_every_section(html):
    """Each entry of the contents list leads to a heading, and each heading has an entry."""
    headings = re.findall(r'<h2 id="(\w+)">', html)
    assert re.findall(r'<li><a href="#(\w+)">', html) == headings and len(headings) == 9


def test_validation_numbers_come_first(html):
    """Each card names its images, and tables list validation images before training images."""
    cards = re.findall(r"<li><span>.*?</li>", html)
    assert len(cards) == 7 and all("validation images" in card for card in cards)
    for table in re.findall(r"<tbody>.*?</tbody>", html, re.DOTALL):
        if ">training<" in table:
            assert table.index(">validation<") < table.index(">training<")


def test_each_curve_is_shown_once(html):
    """MSE is the curve of PSNR and bits are the curve of nats, so neither is drawn."""
    titles = re.findall(r"<figcaption>((?:VQ-VAE|Prior)[^<]*)</figcaption>", html)
    assert titles == ["VQ-VAE: PSNR, dB", "Prior of level top: NLL, nats per code"]


def test_all_samples_are_listed_by_class(html):
    """The list behind one click has every class, with the number of its samples."""
    samples = re.search(r"<details class=.list.>.*?</details>", html, re.DOTALL)
    assert samples and "<summary>More samples by class</summary>" in samples[0]
    assert "cats &amp; dogs: 12<" in samples[0] and "birds: the first 3 of 30<" in samples[0]


def test_codebooks_show_each_entry(html):
    """Each level has a picture of its entries, and says how many of them are used."""
    assert "entries of level bottom, each decoded alone, most used first" in html
    assert re.search(r"Level top: 16 entries, \d+ of them used in training images", html)


def test_page_says_what_made_it(html):
    """The dataset and the sampling settings are on the page."""
    assert "shades: 29 images" in html and "42 samples, temperature 0.7, no top-k, top-p 0.9" in html


def test_images_and_charts_have_text_alternatives(html):
    """Each image has an alt text and each chart an ARIA label."""
    page = Page(html)
    assert len(page.images) > 10
    assert all(attributes.get("alt") or attributes.get("aria-label") for attributes in page.images)


def test_ids_are_unique(html):
    """Charts do not share ids, so each uses its own clip paths and markers."""
    ids = Page(html).ids
    assert len(ids) == len(set(ids)) > 0


def test_names_from_data_are_escaped():
    """A class name that looks like a tag is shown as text."""
    html = render(report_data(class_name="<script>alert(1)</script>"))
    page = Page(html)
    assert "<script>alert" not in html
    assert "<script>alert(1)</script>" in page.text


def test_page_shows_network_direction_and_standard_error_of_kid(html):
    """KID is shown with the feature network, its better direction, its standard error and both baselines."""
    text = Page(html).text
    for expected in (
        NETWORK.name,
        "KID (lower is better)",
        "baseline: random codes",
        "baseline: shuffled codes",
        "nats/code",
    ):
        assert expected in text
    assert re.search(r"0\.\d{4} ± 0\.\d{4}", text)


def test_omitted_measures_are_shown_as_a_dash():
    """The page renders without KID, which a single image does not have."""
    data = report_data()
    metrics = dict(data.metrics)
    metrics["compared"] = {name: {"images": 1, "reference_images": 1} for name in SETS}
    assert "–" in Page(render(replace(data, metrics=metrics))).text


def test_added_comparison_is_computed_and_shown(monkeypatch):
    """A metric added to SET_METRICS is computed for each image set and shown with its better direction."""
    gap = SetMetric("Gap of means", "lower", lambda config: 1, of_features=lambda a, b: float(a.mean() - b.mean()))
    monkeypatch.setitem(SET_METRICS, "gap", gap)
    data = report_data()
    assert all(NETWORK.key("gap") in data.metrics["compared"][name] for name in SETS)
    assert "Gap of means (lower is better)" in Page(render(data)).text


def test_page_of_large_images_is_below_five_megabytes(tmp_path):
    """Noise images of 256 pixels, the least compressible, are reduced on the page and kept in the contact sheets."""
    sheets = write_report(tmp_path, report_data(side=256))
    assert (tmp_path / "report.html").stat().st_size < 5_000_000
    assert set(sheets) == {path.stem for path in tmp_path.glob("*.png")} == {"samples", "reconstructions", "nearest"}


def test_page_of_many_samples_is_bounded():
    """The page of 50,000 samples of 256 noisy pixels shows some hundreds of them, reduced."""
    data = report_data(side=256)
    metrics = {**data.metrics, "num_images": {**data.metrics["num_images"], "samples": 50_000}}
    noise = np.random.default_rng(0).integers(0, 256, (32, 256, 256, 3), dtype=np.uint8)
    samples = {f"class {number}": SamplesOfClass(noise, 3125) for number in range(16)}
    assert len(render(replace(data, metrics=metrics, samples=samples))) < 9_000_000


def test_chart_table_and_plot_show_the_same_psnr_of_the_first_level(tmp_path):
    """The first level alone is filled with zeros everywhere, as level dropout trains the decoder."""
    data = report_data()
    values = data.metrics["reconstruction"]["validation"]
    values["top_filled_with_zeros"]["psnr"], values["top_filled_with_mean"]["psnr"] = 19.25, 15.75
    rows = summary.rate_distortion(data.metrics["rate"], values, list(LEVELS))
    assert {(row["rate"], row["psnr"]) for row in rows if row["point"] == "top"} == {
        (kind, 19.25) for kind in ("fixed", "prior", "files")
    }
    data.metrics["rate_distortion"][: len(rows)] = rows
    write_plots(tmp_path, data.metrics, data.entry_counts)
    plotted = list(csv.DictReader((tmp_path / "rate_distortion.csv").open()))
    assert {row["psnr"] for row in plotted if row["levels"] == "top"} == {"19.25"}
    html = render(data)
    assert re.search(r">zeros</td>.*>19\.25</td>", html)
    assert html.count("; other levels are zeros</figcaption><button") == 2  # both charts


def test_page_shows_the_rungs_of_the_quality_ladder(html):
    """Each rung has a picture and a row, best first; without a ladder the section is left out."""
    text = Page(html).text
    for label in ladder.labels(LEVELS).values():
        assert text.count(label) >= 2
    assert "real top; drawn bottom" in text and "KID increase" in text
    data = report_data()
    metrics = {name: values for name, values in data.metrics.items() if name != "ladder"}
    without = render(replace(data, metrics=metrics, rungs={}))
    assert "Quality ladder" in html and "Quality ladder" not in without


def test_fill_by_the_prior_is_shown_in_pictures_only(html):
    """The first level with the others drawn from their priors, at random and most probable, has no distortion."""
    text = Page(html).text
    assert "top: other levels are drawn from their priors at temperature 1" in text
    assert "top: other levels are the most probable code of their priors at each position" in text
    assert ">mode<" not in html and ">prior<" not in html


def test_codecs_are_drawn_beside_the_levels(html):
    """The charts have a line for each codec of the metrics, and the page says which are left out, and why."""
    text = Page(html).text
    for chart in re.findall(r'<svg [^>]*aria-label="Rate and (?:PSNR|SSIM).*?</svg>', html, re.DOTALL):
        assert ">JPEG<" in chart and ">WebP<" in chart and ">AVIF<" not in chart
    assert "Rate and PSNR, dB, from the first level" in text and "Rate and SSIM, from the first level" in text
    assert "AVIF: left out, because this Pillow cannot write such files." in text
    assert ">quality 50<" in html


def test_gaps_of_contact_sheets_are_transparent():
    """Pictures suit the light and the dark theme: the page shows between the images, which are opaque."""
    images = np.full((3, 64, 64, 3), 255, np.uint8)
    for embedded in (picture("", images, "alt", columns=2), picture_list("", images, "alt")):
        data = base64.b64decode(embedded.url.partition(",")[2])
        with Image.open(io.BytesIO(data)) as sheet:
            alpha = np.asarray(sheet.convert("RGBA"))[..., 3]
        assert set(np.unique(alpha)) == {0, 255} and (alpha == 255).sum() == 3 * 64 * 64
