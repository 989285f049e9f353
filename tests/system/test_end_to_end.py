"""Tests of a full run from a zip of images to the report."""

import json
import re
from pathlib import Path

from pipeline.dvc_yaml import VERSIONS_STAGE
from tests.command_line_project import CommandLineProject, CommandResult

STAGES = {"shard", "vqvae", "codes", "prior_top", "prior_bottom", "sample", "evaluate"}


def test_a_first_run_executes_every_stage(first_run: tuple[CommandLineProject, CommandResult]):
    """Every stage reports that it runs, and the last line is the path of the report."""
    project, result = first_run
    assert result.stages("runs") == STAGES
    report = project.folder / "artifacts" / "report" / "report.html"
    assert result.output.splitlines()[-1].split() == ["report", str(report.relative_to(project.folder))]
    assert not re.search(r"https?://|src=\"//", report.read_text(encoding="utf-8"))
    assert "Traceback" not in result.output


def test_metrics_of_every_stage_are_json(first_run: tuple[CommandLineProject, CommandResult]):
    """`dvc metrics show` reads the metrics of every stage that measures results, and of no other."""
    project, _ = first_run
    files = {path.stem: json.loads(path.read_text()) for path in Path(project.folder, "metrics").glob("*.json")}
    assert set(files) == STAGES - {"codes", "sample"}
    assert all(files.values())
    metrics = json.loads(project.call("dvc", "metrics", "show", "--json").output)
    assert len(metrics[""]["data"]) == len(files)


def test_a_second_run_executes_nothing(project: CommandLineProject):
    """DVC reports no change but the stage that always runs, and the command starts no cluster."""
    assert json.loads(project.call("dvc", "status", "--json").output) == {VERSIONS_STAGE: ["always changed"]}
    assert project.run().output == "Everything is up to date.\n"


def test_dvc_repro_works_without_the_command_line(project: CommandLineProject):
    """`dvc repro` finds nothing to do after a run, and executes the stages itself."""
    assert re.findall("Running stage '(.+)'", project.call("dvc", "repro").output) == [VERSIONS_STAGE]
    (project.folder / "artifacts" / "samples" / "manifest.json").unlink()
    before = project.digests("report")
    done = project.call("dvc", "repro", "--force", "--single-item", "sample")
    assert "Running stage 'sample'" in done.output
    assert project.call("dvc", "status").output.split() == [f"{VERSIONS_STAGE}:", "always", "changed"]
    assert project.digests("report") == before
