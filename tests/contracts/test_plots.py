"""`dvc plots show` and `dvc metrics show` on the files of stages: named axes, one line per split, no network."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stages import vqvae
from stages.evaluation import summary
from stages.evaluation.plots import write_plots
from stages.formats import curves
from stages.images.contact_sheet import contact_sheet
from tests.chromium import console_messages, document, needs_chromium, requested_hosts
from tests.stages.evaluation.test_report import LEVELS, NETWORK, report_data

ROOT = Path(__file__).parents[2]
PLOTS = {
    "VQ-VAE - mean squared error": ("step", "mse"),
    "VQ-VAE - PSNR": ("step", "psnr"),
    "VQ-VAE - perplexity": ("step", "perplexity"),
    "plots/priors/top.csv": ("step", "nll"),
    "plots/priors/bottom.csv": ("step", "nll"),
    "NLL by level": ("nll", "level"),
    "Rate-distortion": ("bits_per_pixel", "psnr"),
    "Codebook usage": ("rank", "usage"),
}
IMAGES = {"plots/evaluate/samples.png", "plots/evaluate/reconstructions.png"}


def history(names: list[str]) -> list[dict]:
    return [
        {"step": step, "name": f"{split}/{name}", "value": number / step}
        for split, number in (("train", 1), ("validation", 2))
        for step in (10, 20, 30)
        for name in names
    ]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """Project with the settings of this one, and with metrics, plots and pictures."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copyfile(ROOT / name, folder / name)
    (folder / ".dvc").mkdir()
    shutil.copyfile(ROOT / ".dvc/config", folder / ".dvc/config")
    shutil.copytree(ROOT / ".dvc/plots", folder / ".dvc/plots")
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    perplexities = [f"perplexity_{level}" for level in LEVELS]
    vqvae.write_metrics_and_plots(
        folder / "metrics/vqvae.json",
        folder / "plots/vqvae",
        history(["mse", "psnr", "commitment", *perplexities]),
        list(LEVELS),
    )
    for level in LEVELS:
        curves.write_curves_plot(
            folder / f"plots/priors/{level}.csv", history(["nll_nats_per_code"]), {"nll_nats_per_code": "nll"}, level
        )
        curves.write_metrics(folder / f"metrics/prior_{level}.json", {"nll": 2.0100383, "nll_train": 1.7411665})
    data = report_data()
    write_plots(folder / "plots/evaluate", dict(data.metrics), data.entry_counts)
    curves.write_metrics(folder / "metrics/evaluate.json", summary.headline(dict(data.metrics), [NETWORK]))
    curves.write_metrics(folder / "metrics/shard.json", {"images": 3372})
    for name in IMAGES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(contact_sheet(data.originals, 4))
    return folder


def dvc(project: Path, *arguments: str) -> str:
    program = Path(sys.executable).with_name("dvc")
    return subprocess.run([program, *arguments], cwd=project, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def page(project) -> Path:
    dvc(project, "plots", "show")
    return project / "dvc_plots/index.html"


def test_plots_have_named_axes_and_a_title(project):
    """DVC draws the plots of dvc.yaml and no other, each with its own x, y, labels and title."""
    output = json.loads(dvc(project, "plots", "show", "--json"))
    assert "errors" not in output
    assert output["data"].keys() == PLOTS.keys() | IMAGES
    for name, (x, y) in PLOTS.items():
        (plot,) = output["data"][name]
        spec = plot["content"]
        axes = spec["encoding"]
        assert (axes["x"]["field"], axes["y"]["field"]) == (x, y)
        assert spec["title"]["text"] and axes["x"]["title"] and axes["y"]["title"]
        assert axes["color"]["field"] == "series"


def test_training_and_validation_are_lines_of_their_own(project):
    """The points of each split have a name that the template maps to a colour."""
    output = json.loads(dvc(project, "plots", "show", "--json"))["data"]

    def series(name: str) -> set[str]:
        return {point["series"] for point in output[name][0]["content"]["data"]["values"]}

    assert series("VQ-VAE - PSNR") == {"train", "validation"}
    assert series("plots/priors/top.csv") == {"top, train", "top, validation"}
    assert series("VQ-VAE - perplexity") == {
        f"{level}, {split}" for level in LEVELS for split in ("train", "validation")
    }


def test_page_names_no_server(page):
    """The page contains the scripts that draw, instead of DVC's references to a server."""
    html = page.read_text(encoding="utf-8")
    assert not re.search(r"<(script|link|img|iframe)[^>]*(src|href)=.https?:", html)
    assert len(html) < 1_500_000


def test_pages_of_plots_are_ignored_by_git(project):
    """`dvc plots show` leaves no untracked files behind."""
    shutil.copyfile(ROOT / ".gitignore", project / ".gitignore")
    dvc(project, "plots", "show")
    status = subprocess.check_output(["git", "status", "--porcelain"], cwd=project, text=True)
    assert "dvc_plots" not in status


@needs_chromium
def test_page_is_drawn_without_a_network(page, tmp_path):
    """Chromium draws every plot, without a message on the console and without a request."""
    assert console_messages(tmp_path, page) == []
    assert document(tmp_path, page).count("<svg") == len(PLOTS)
    assert not requested_hosts(tmp_path, page)


def test_metrics_fit_on_a_screen(project):
    """`dvc metrics show` needs at most 160 columns for the two levels of the demo, and a few lines."""
    lines = dvc(project, "metrics", "show").splitlines()
    assert len(lines) == 6 and max(map(len, lines)) <= 160
