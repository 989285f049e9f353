"""Report page in Chromium: no requests, no scrolling sideways, enlarged pictures, and the facts of its run."""

import re
from pathlib import Path

import pytest

from stages.evaluation.report import write_report
from stages.formats import artifact
from stages.tracking import provenance
from stages.tracking.tracker import PipelineRun
from tests.chromium import console_messages, document, needs_chromium, requested_hosts
from tests.stages.evaluation.test_report import PROVENANCE, report_data

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """Report in a project folder, with the facts of its run beside it."""
    root = tmp_path_factory.mktemp("project")
    out, work = root / "artifacts" / "report", (root / "artifacts/report" / PROVENANCE).resolve().parent
    work.mkdir(parents=True)
    with artifact.commit_folder(out, "report", {}) as folder:
        write_report(folder, report_data())
    compute = {"device": "CPU", "devices": 2}
    provenance.record_facts("evaluate", out, work, 65, [], PipelineRun(), "experiment=tiny </script>", compute)
    return out / "report.html"


def in_frame(folder: Path, page: Path, expression: str, *, width: int = 390) -> str:
    """Return the value of a JavaScript expression about the `frame` that shows a page."""
    outer = folder / "frame.html"
    set_title = f"const frame = this; document.title = {expression}".replace('"', "'")
    outer.write_text(f'<iframe width="{width}" height="900" src="{page.as_uri()}" onload="{set_title}"></iframe>')
    title = re.search(r"<title>(.*?)</title>", document(folder, outer, "--allow-file-access-from-files"), re.DOTALL)
    assert title
    return title[1]


def test_page_fits_a_phone_and_a_desktop(tmp_path, page):
    """The page is not wider than the window."""
    width = "frame.contentDocument.documentElement.scrollWidth"
    assert 300 < int(in_frame(tmp_path, page, width, width=390)) <= 390
    assert 1000 < int(in_frame(tmp_path, page, width, width=1280)) <= 1280


@pytest.mark.parametrize("width", [390, 1280])
def test_no_table_scrolls_sideways(tmp_path, page, width: int):
    """Every table fits its region, also those behind a click."""
    regions = "Array.from(frame.contentDocument.querySelectorAll('.wide'))"
    opened = "frame.contentDocument.querySelectorAll('details').forEach(details => details.open = true)"
    wider = f"({opened}, {regions}.filter(r => r.scrollWidth > r.clientWidth).map(r => r.ariaLabel).join())"
    assert in_frame(tmp_path, page, f"'wider: ' + {wider}", width=width) == "wider: "


def test_page_contacts_no_host(tmp_path, page):
    """A request of a page would be seen."""
    requesting = tmp_path / "requesting.html"
    requesting.write_text(
        '<img src="http://report.invalid/image.png"><script>fetch("https://script.invalid/data")</script>'
    )
    assert requested_hosts(tmp_path, requesting) == {"report.invalid", "script.invalid"}
    assert not requested_hosts(tmp_path, page)


def test_scripts_run_without_a_message(tmp_path, page):
    """The content security policy allows the scripts of the page."""
    assert console_messages(tmp_path, page) == []


def test_click_enlarges_a_picture_and_a_click_closes_it(tmp_path, page):
    """The dialog shows the clicked picture in the size of the window."""
    image = "frame.contentDocument.querySelector('#samples ~ div button')"
    dialog = "frame.contentDocument.getElementById('viewer')"
    shown = f"{dialog}.open + ' ' + ({dialog}.firstElementChild.clientWidth > 300)"
    steps = f"({image}.click(), {shown}) + ' ' + ({dialog}.firstElementChild.click(), {dialog}.open)"
    assert in_frame(tmp_path, page, steps) == "true true false"


def test_facts_of_the_run_are_shown(tmp_path, page):
    """The page shows the facts of the run beside it, and so does the copy for MLflow in another folder."""
    copy = tmp_path / "copied.html"
    copy.write_text(next(page.parents[2].glob("runs/evaluate/*/report.html")).read_text(encoding="utf-8"))
    for path in (page, copy):
        html = document(tmp_path, path)
        assert "experiment=tiny &lt;/script&gt;" in html
        assert ">1 min 5 s: evaluate 1 min 5 s" in html
        assert (
            '<th scope="col" class="text">augmentation</th>' in html and '<th scope="row" class="text">evaluate' in html
        )
        assert '<div id="compute">' in html
        assert "no-provenance" not in re.sub(r"<style>.*</style>|<script>.*</script>", "", html, flags=re.DOTALL)


def test_page_without_facts_says_where_they_are(tmp_path, page):
    """A copy of the page alone shows everything else."""
    alone = tmp_path / "alone.html"
    alone.write_text(page.read_text(encoding="utf-8"))
    html = document(tmp_path, alone)
    assert "in the folder that computed this report" in html and '<div id="compute" hidden="">' in html
