"""`vqvae2 run` and its neighbours, as a person calls them."""

import json
from pathlib import Path

import pytest

STAGES = ["shard", "vqvae", "codes", "prior_top", "prior_bottom", "sample", "evaluate"]


def test_a_dry_run_says_why_and_changes_nothing(project):
    """--dry-run with overrides tells what they would do, and leaves params.yaml as it was."""
    before = (project.folder / "params.yaml").read_text()
    done = project.command("run", "--dry-run", "-S", "experiment=smoke")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[:-1]] == STAGES
    assert "shard         would run: it has not run yet" in done.stdout
    assert (project.folder / "params.yaml").read_text() == before


def test_a_dry_run_of_a_stage_is_about_what_it_needs(project):
    """--stage names a stage and what it needs."""
    done = project.command("run", "--dry-run", "--stage", "prior_bottom")
    assert [line.split()[0] for line in done.stdout.splitlines()[:-1]] == ["shard", "vqvae", "codes", "prior_bottom"]


def test_status_is_readable_by_programs(project):
    """--json gives each stage's state and reasons."""
    rows = json.loads(project.command("status", "--json").stdout)
    assert [row["stage"] for row in rows] == STAGES
    assert all(row["state"] == "out of date" and row["reasons"] == ["it has not run yet"] for row in rows)


def test_config_writes_what_it_prints(project):
    """`config --write` puts the printed settings into params.yaml, with an added level in its place."""
    overrides = ["vqvae=three_level", "+prior@priors.middle=pixelcnn", "seed=3"]
    printed = project.command("config", *overrides).stdout
    assert project.command("config", *overrides, "--write").stdout == ""
    assert (project.folder / "params.yaml").read_text() == printed
    rows = json.loads(project.command("status", "--json").stdout)
    assert [row["stage"] for row in rows if row["stage"].startswith("prior")] == [
        "prior_top", "prior_bottom", "prior_middle",
    ]  # fmt: skip


def test_plan_counts_the_papers_model(project):
    """`plan` knows the size of the paper's VQ-VAE before anything runs."""
    done = project.command("plan", "-S", "experiment=imagenet256", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["trainings"][0]["stage"] == "vqvae" and plan["trainings"][0]["parameters"] == 1_782_339
    assert [each["stage"] for each in plan["trainings"]] == ["vqvae", "prior_top", "prior_bottom"]
    assert plan["code_bytes_per_image"] == (32**2 + 64**2) * 9 / 8


def test_the_doctor_finds_this_machine_well(project):
    """`doctor` names what it looked at, as lines and as JSON."""
    done = project.command("doctor", "--json")
    findings = {each["name"]: each["state"] for each in json.loads(done.stdout)}
    assert findings["settings"] == findings["images"] == findings["packages"] == "ok"
    assert done.returncode == 0


@pytest.mark.ray
@pytest.mark.slow
def test_the_smallest_run_from_images_to_report(project):
    """All stages run; nothing runs twice; a change runs what depends on it; going back restores it."""

    def run(*overrides: str) -> dict[str, str]:
        done = project.command("run", *(word for each in ("experiment=smoke", *overrides) for word in ("-S", each)))
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        rows = (line.split(maxsplit=1) for line in done.stdout.splitlines())
        return {row[0]: row[1].split(":")[0] for row in rows if row[0] in STAGES}

    assert run() == dict.fromkeys(STAGES, "runs")
    artifacts = project.folder / "artifacts"
    report = (artifacts / "report" / "report.html").read_bytes()
    assert {path.name for path in artifacts.iterdir()} >= {"shards", "vqvae", "codes", "priors", "samples", "report"}

    assert project.command("run").stdout.startswith("Everything is up to date.")
    assert run("cluster=workers2") == {}

    changed = run("sample.temperature=0.8")
    assert {stage for stage, what in changed.items() if what == "runs"} == {"sample", "evaluate"}
    back = run()
    assert {stage for stage, what in back.items() if what == "restored from cache"} == {"sample", "evaluate"}
    assert "runs" not in back.values()
    assert (artifacts / "report" / "report.html").read_bytes() == report

    drawn = project.command("sample", "drawn", "--count", "4", "--class", "flags")
    assert drawn.returncode == 0, drawn.stderr
    assert len(list(Path(project.folder, "drawn").glob("0*.png"))) == 4
