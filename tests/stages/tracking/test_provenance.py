"""Facts of runs: they lie outside the artifacts, and the report shows those of the stages before it."""

import json
from pathlib import Path

import pytest

from stages.formats import artifact
from stages.tracking import provenance
from stages.tracking.journal import Journal
from stages.tracking.tracker import PipelineRun

PAGE = '<p>Report.</p><script src="../../runs/evaluate/0123/provenance.js"></script><script>show()</script>'


COMPUTE = {"device": "CPU", "devices": 2}
TRAINING = {
    **COMPUTE,
    "images": 64000,
    "flop": 2.5e15,
    "batch_size": 32,
    "learning_rate": "0.002, cosine",
    "augmentation": "flip",
}


def record(
    root: Path, stage: str, seconds: float, *, inputs: tuple[str, ...] = (), parent: object = None, compute=COMPUTE
) -> str:
    """Write an artifact and record the facts of its stage; return its digest."""
    out, work = root / "artifacts" / stage, root / "runs" / stage / "0123"
    work.mkdir(parents=True, exist_ok=True)
    with artifact.commit_folder(out, stage, {}) as folder:
        name = "report.html" if stage == "evaluate" else "model.txt"
        (folder / name).write_text(PAGE if stage == "evaluate" else stage)
    run = PipelineRun(tags={"command": "dvc repro"}) if parent is None else parent
    provenance.record_facts(stage, out, work, seconds, inputs, run, "experiment=tiny", compute)
    return artifact.sha256(out / artifact.MANIFEST)


def shown_facts(root: Path) -> dict[str, str]:
    text = (root / "runs/evaluate/0123" / provenance.PROVENANCE_SCRIPT).read_text()
    return json.loads(text.removeprefix("window.provenance = ").removesuffix(";\n"))


def test_report_has_the_facts_of_the_stages_that_it_used(tmp_path: Path):
    """Durations are those of the runs that wrote its inputs; runs of other results are left out."""
    digest = record(tmp_path, "vqvae", 3700)
    record(tmp_path, "codes", 5)
    record(tmp_path, "evaluate", 61, inputs=(digest,))
    facts = shown_facts(tmp_path)
    assert facts["Duration"].startswith("1 h 2 min: vqvae 1 h 1 min (") and "evaluate 1 min 1 s" in facts["Duration"]
    assert "codes" not in facts["Duration"]
    assert facts["Command"] == "dvc repro" and facts["Preset and overrides"] == "experiment=tiny"
    assert "processors" in facts["Machine"] and facts["Date"].endswith("UTC")


def test_report_has_the_compute_of_each_stage(tmp_path: Path):
    """Device-hours are devices times the time of all attempts; a training also has its data, FLOP and settings."""
    clock = iter([100.0, 3700.0, 9000.0, 9000.0]).__next__
    for _ in range(2):  # an attempt of one hour, and the one that ended
        journal = Journal(tmp_path / "runs/vqvae/0123/tracked/key", clock)
        journal.begin("key", "vqvae", "f", {}, {}, inputs={}, parent="")
        journal.message("working")
        journal.close()
    digest = record(tmp_path, "vqvae", 1800, compute=TRAINING)
    record(tmp_path, "evaluate", 36, inputs=(digest,))
    table = shown_facts(tmp_path)["compute"]
    assert table["header"][:4] == ["stage", "device", "devices", "device-hours"]
    assert table["rows"] == [
        ["vqvae", "CPU", "2", "3", "64,000", "2,500", "32", "0.002, cosine", "flip"],
        ["evaluate", "CPU", "2", "0.02", *["–"] * 5],
    ]


def test_command_is_that_of_the_pipeline_run(tmp_path: Path):
    """The journal of the pipeline run has the command and the key by which MLflow finds it."""
    journal = Journal(tmp_path / "pipeline" / "20260101-key")
    journal.begin("20260101-key", "pipeline", "f", {}, {"command": "vqvae2 run -S seed=1"}, inputs={}, parent="")
    journal.close()
    record(tmp_path, "evaluate", 1, parent=str(journal.folder))
    facts = shown_facts(tmp_path)
    assert facts["Command"] == "vqvae2 run -S seed=1"
    assert facts["Search in MLflow"] == "tags.`vqvae2.key` = '20260101-key'"


def test_artifact_has_no_facts_and_the_copy_has_them(tmp_path: Path):
    """The tracked page stays as the stage wrote it; the copy holds the facts in place of the reference."""
    record(tmp_path, "evaluate", 1)
    assert (tmp_path / "artifacts/evaluate/report.html").read_text() == PAGE
    copy = provenance.report_copy(tmp_path / "runs/evaluate/0123").read_text()
    assert "src=" not in copy and copy.endswith("<script>show()</script>")
    assert '<script type="application/json" id="provenance">{' in copy


@pytest.mark.parametrize("change", [None, {"seconds": None}, {"stage": 3}, {"started": ...}, {"machine": ["a"]}])
def test_damaged_facts_are_ignored(tmp_path: Path, change):
    """A report is written although the facts of another stage cannot be read, or are those of another version."""
    digest = record(tmp_path, "vqvae", 1)
    path = tmp_path / "runs/vqvae/0123/provenance.json"
    facts = {**json.loads(path.read_text()), **(change or {})}
    text = json.dumps({name: value for name, value in facts.items() if value is not ...})
    path.write_text(text if change else text[:9])
    record(tmp_path, "evaluate", 2, inputs=(digest,))
    assert shown_facts(tmp_path)["Duration"].startswith("2 s: evaluate")


def test_credentials_are_masked(tmp_path: Path):
    """The page and its copy, which MLflow gets, have no secret of the command or the overrides."""
    url = "cluster.storage=s3://AKIA:hunter2@bucket/p"
    out, work = tmp_path / "artifacts" / "evaluate", tmp_path / "runs" / "evaluate" / "0123"
    work.mkdir(parents=True)
    with artifact.commit_folder(out, "evaluate", {}) as folder:
        (folder / "report.html").write_text(PAGE)
    run = PipelineRun(tags={"command": f"vqvae2 run -S {url}"})
    provenance.record_facts("evaluate", out, work, 1, (), run, url, COMPUTE)
    assert shown_facts(tmp_path)["Command"] == "vqvae2 run -S cluster.storage=s3://***@bucket/p"
    for path in work.iterdir():
        assert "hunter2" not in path.read_text() and "s3://***@bucket/p" in path.read_text()
