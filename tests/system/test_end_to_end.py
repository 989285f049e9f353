"""From a zip of images to a report by one command, and nothing to do the second time."""

import json
import re
from pathlib import Path

from projects import Done, Project

STAGES = {"shard", "vqvae", "codes", "prior_top", "prior_bottom", "sample", "evaluate"}


def test_every_stage_runs_and_ends_with_the_report(first_run: tuple[Project, Done]):
    """On a fresh copy all stages run, none is silent, and the last line is the report's path."""
    project, done = first_run
    assert done.told("runs") == STAGES
    report = project.folder / "artifacts" / "report" / "report.html"
    assert done.output.splitlines()[-1].split() == ["report", str(report.relative_to(project.folder))]
    assert not re.search(r"https?://|src=\"//", report.read_text(encoding="utf-8"))
    assert "Traceback" not in done.output


def test_metrics_of_every_stage_are_json(first_run: tuple[Project, Done]):
    """Each stage that measures leaves numbers that `dvc metrics show` reads."""
    project, _ = first_run
    files = {path.stem: json.loads(path.read_text()) for path in Path(project.folder, "metrics").glob("*.json")}
    assert set(files) == STAGES - {"sample"}
    assert all(files.values())
    shown = json.loads(project.call("dvc", "metrics", "show", "--json").output)
    assert len(shown[""]["data"]) == len(files)


def test_a_second_run_runs_nothing(project: Project):
    """DVC finds all clean, and so does the command, which starts no cluster to say so."""
    assert json.loads(project.call("dvc", "status", "--json").output) == {}
    done = project.run()
    assert done.output == "Everything is up to date.\n"


def test_dvc_alone_agrees(project: Project):
    """`dvc repro` needs no wrapper: it finds nothing to do after our run, and runs our stages itself."""
    assert "Running stage" not in project.call("dvc", "repro").output
    (project.folder / "artifacts" / "samples" / "manifest.json").unlink()
    before = project.digests("report")
    done = project.call("dvc", "repro", "--force", "--single-item", "sample")
    assert "Running stage 'sample'" in done.output
    assert project.call("dvc", "status").output.strip().endswith("up to date.")
    assert project.digests("report") == before
