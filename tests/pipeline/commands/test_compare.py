"""Tests of `vqvae2 compare`: every kind of run that a name may stand for, the text and the page."""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
from contextlib import chdir
from pathlib import Path

import pytest
from PIL import Image
from ruamel.yaml import YAML

from pipeline import compare_page, compared_runs
from pipeline.commands import compare as command
from pipeline.compared_runs import WORKSPACE, ComparedRun
from pipeline.comparison import MetricPair, compare
from stages.errors import UserError
from stages.tracking.journal import Journal
from tests.chromium import document, needs_chromium, requested_hosts

GIT = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
KEY = "20260101-000000-abcdef"


def png(color: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 32), color).save(buffer, "PNG")
    return buffer.getvalue()


def write_run(steps: int, psnr: float, color: str) -> None:
    """Write the settings, numbers and report of a finished run into the current folder."""
    Path("params.yaml").write_text(f"priors:\n  top:\n    train:\n      steps: {steps}\nseed: 0\n")
    Path("dvc.yaml").write_text("stages:\n  evaluate:\n    cmd: none\n    metrics: [metrics/evaluate.json]\n")
    Path("metrics").mkdir(exist_ok=True)
    Path("metrics/evaluate.json").write_text(json.dumps({"psnr": psnr, "kid": 0.1}))
    Path("artifacts/report").mkdir(parents=True, exist_ok=True)
    Path("artifacts/report/report.html").write_text("<html>")
    for name in compared_runs.PICTURES:
        Path(f"artifacts/report/{name}.png").write_bytes(png(color))


def store(data: bytes, suffix: str = "") -> str:
    """Store contents as DVC's cache does, and return their MD5."""
    md5 = hashlib.md5(data).hexdigest() + suffix
    path = Path("cache/files/md5", md5[:2], md5[2:])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return md5


def commit(message: str) -> None:
    """Commit the current run, with its report in DVC's cache."""
    report = Path("artifacts/report")
    listing = [{"relpath": path.name, "md5": store(path.read_bytes())} for path in report.iterdir()]
    outs = [{"path": report.as_posix(), "md5": store(json.dumps(listing).encode(), ".dir")}]
    YAML(typ="safe", pure=True).dump({"stages": {"evaluate": {"outs": outs}}}, Path("dvc.lock"))
    subprocess.run([*GIT, "add", "params.yaml", "dvc.yaml", "dvc.lock", "metrics"], check=True)
    subprocess.run([*GIT, "commit", "-q", "-m", message], check=True)


@pytest.fixture
def project(tmp_path: Path):
    """A project with a committed run of 8 steps, and one of 12 steps in its files."""
    with chdir(tmp_path):
        subprocess.run([*GIT, "init", "-q", "-b", "trunk"], check=True)
        write_run(8, 20.0, "red")
        commit("first")
        write_run(12, 21.5, "blue")
        yield tmp_path


def find(name: str) -> ComparedRun:
    return compared_runs.find(name, lambda: Path("cache"))


def test_revision_is_compared_with_the_workspace(project):
    """The settings that differ, and the numbers with their difference; pictures of a revision are in DVC's cache."""
    comparison = compare(find("trunk"), find(WORKSPACE))
    assert [str(change) for change in comparison.settings] == ["priors.top.train.steps 8 -> 12"]
    cells = {number.name: number.cells() for number in comparison.numbers}
    assert cells == {
        "evaluate.psnr": ("20", "21.5", "+1.5", "+7.5%"),
        "evaluate.kid": ("0.1", "0.1", "equal", ""),
    }
    assert comparison.a.pictures["samples"] == png("red") and comparison.b.pictures["samples"] == png("blue")
    assert comparison.notes == []


def test_metrics_that_no_stage_writes_are_left_out(project):
    """The file of a removed level stays in the folder, and in the commits after."""
    Path("metrics/prior_middle.json").write_text('{"nll": 2.0}')
    commit("with an old file")
    for run in (find("trunk"), find(WORKSPACE), find("artifacts/report")):
        assert list(run.numbers) == ["evaluate.psnr", "evaluate.kid"]


def test_store_that_does_not_answer_is_named(project, monkeypatch):
    """The id may be that of a run there."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"is not a run.*MLflow does not answer \(Connection refused\)"):
        find("0123456789abcdef" * 2)


def test_pictures_that_are_not_in_the_cache_are_named(project):
    """The note has the command that downloads them."""
    shutil.rmtree("cache")
    (note,) = find("trunk").notes
    assert note.text.startswith("trunk has no pictures of samples and reconstructions.")
    assert note.command == "dvc fetch --all-commits evaluate" and str(note).endswith(f": {note.command}")
    page = compare_page.render(compare(find("trunk"), find(WORKSPACE)))
    assert "<code>dvc fetch --all-commits evaluate</code></li>" in page


def test_experiment_of_dvc_is_found_by_its_name(project):
    """DVC keeps an experiment as a Git reference."""
    commit("lumpy-bird")
    subprocess.run([*GIT, "update-ref", "refs/exps/ab/cdef0123/lumpy-bird", "HEAD"], check=True)
    subprocess.run([*GIT, "reset", "-q", "--hard", "HEAD~1"], check=True)
    run = find("lumpy-bird")
    assert run.settings["priors.top.train.steps"] == 12 and run.description.startswith("DVC experiment ")
    assert run.pictures["reconstructions"] == png("blue")


@pytest.mark.parametrize(
    ("ref", "headline", "fix"),
    [
        ("stash", "waits in the queue", "dvc queue start"),
        ("failed", "failed", "dvc queue logs lumpy-bird"),
    ],
)
def test_experiment_without_results_is_no_unknown_name(project, ref, headline, fix):
    """DVC's queue and its failed experiments are reflogs; the older entry is no reference of its own."""
    for name in ("lumpy-bird", "tidy-fish"):
        message = f"commit: dvc-exp:{'0' * 40}:{'1' * 40}:{name}"
        head = subprocess.run([*GIT, "commit-tree", "HEAD^{tree}", "-m", name], capture_output=True, check=True).stdout
        update = ["update-ref", "--create-reflog", "-m", message, f"refs/exps/celery/{ref}", head.decode().strip()]
        subprocess.run([*GIT, *update], check=True)
    with pytest.raises(UserError, match=rf"^lumpy-bird is a DVC experiment that {headline}, so") as caught:
        find("lumpy-bird")
    assert caught.value.fix.endswith(fix)


def write_run_file(state: int, location: str, process: dict[str, int | None] | None) -> None:
    """Write what DVC writes beside an experiment that it runs; only those of the queue have a process."""
    folder = Path(".dvc/tmp/exps/run/0123")
    folder.mkdir(parents=True, exist_ok=True)
    Path(folder, "0123.run").write_text(json.dumps({"name": "lumpy-bird", "location": location, "status": state}))
    if process:
        Path(folder, "0123.json").write_text(json.dumps(process))


@pytest.mark.parametrize(
    ("location", "fix"),
    [
        ("dvc-task", "dvc queue logs -f lumpy-bird"),
        ("workspace", "vqvae2 status"),
        ("tempdir", "Wait until it ends."),
    ],
)
def test_running_experiment_is_no_unknown_name(project, location, fix):
    """The error says how to look at it."""
    in_queue = location == "dvc-task"
    write_run_file(2, location, {"pid": os.getpid(), "returncode": None} if in_queue else None)
    with pytest.raises(UserError, match=r"^lumpy-bird is a DVC experiment that is running, so") as caught:
        find("lumpy-bird")
    assert caught.value.fix.endswith(fix) and caught.value.code == 2


@pytest.mark.parametrize(
    ("state", "process"),
    [
        (6, {"pid": os.getpid(), "returncode": None}),
        (2, {"pid": 2**22 + 1, "returncode": None}),
        (2, {"pid": 1, "returncode": -9}),
    ],
    ids=["finished", "killed", "ended"],
)
def test_ended_experiment_is_not_called_running(project, state, process):
    """DVC does not correct the file of an experiment whose process was killed."""
    write_run_file(state, "dvc-task", process)
    with pytest.raises(UserError, match="lumpy-bird is not a run"):
        find("lumpy-bird")


def test_numbers_of_other_settings_are_named(project):
    """Settings that have changed since the run are not those of its numbers; those of other releases are left out."""
    recorded = {"params.yaml": {"priors.top": {"train": {"steps": 8, "former": 1}}, "seed": 0}}
    YAML(typ="safe", pure=True).dump({"stages": {"evaluate": {"params": recorded}}}, Path("dvc.lock"))
    (note,) = find(WORKSPACE).notes
    assert note.text.startswith("Numbers of workspace were computed before settings of its params.yaml changed: ")
    assert note.text.endswith("priors.top.train.steps 8 -> 12. To compute them:") and note.command == "vqvae2 run"
    subprocess.run([*GIT, "commit", "-qam", "not run"], check=True)
    (note, _) = find("trunk").notes  # the other one: no pictures
    assert note.text.endswith("priors.top.train.steps 8 -> 12.") and not note.command
    recorded["params.yaml"]["priors.top"]["train"]["steps"] = 12
    YAML(typ="safe", pure=True).dump({"stages": {"evaluate": {"params": recorded}}}, Path("dvc.lock"))
    assert find(WORKSPACE).notes == []


def test_numbers_of_earlier_inputs_are_named(project):
    """After an interruption, later stages have the results of earlier inputs."""
    outs = [{"path": "artifacts/vqvae", "md5": "new.dir"}]
    for md5, count in (("old.dir", 1), ("new.dir", 0)):
        deps = [{"path": "artifacts/vqvae", "md5": md5}, {"path": "data/images", "md5": "any"}]
        former = {"deps": [{"path": "artifacts/vqvae", "md5": "former.dir"}]}  # of a level that is no more
        lock = {"stages": {"vqvae": {"outs": outs}, "evaluate": {"deps": deps}, "prior@former": former}}
        YAML(typ="safe", pure=True).dump(lock, Path("dvc.lock"))
        texts = [note.text for note in find(WORKSPACE).notes]
        expected = "Numbers of workspace were computed before the inputs of evaluate changed. To compute them:"
        assert texts == [expected] * count


def test_report_folder_has_the_settings_of_its_project(project, tmp_path_factory):
    """A copied report has pictures only."""
    report = find("artifacts/report")
    assert (report.settings["seed"], report.numbers["evaluate.psnr"]) == (0, 21.5)
    copy = tmp_path_factory.mktemp("copies") / "somewhere" / "report"
    shutil.copytree("artifacts/report", copy)
    run = find(str(copy))
    assert run.pictures["samples"] == png("blue") and "no settings" in run.notes[0].text
    assert compare(run, report).settings == []


def write_journals(parent: str) -> None:
    """Write the journals of a pipeline run and its last stage."""
    journal = Journal(Path("runs/pipeline") / parent)
    params = {"priors.top.train.steps": "90", "sample.classes": "('a', 'b')", "dataset.name": "emoji"}
    tags = {"mlflow.runName": "emoji, more steps"}
    journal.begin(parent, "pipeline", "fingerprint", params, tags, inputs={}, parent="")
    journal.end("FINISHED")
    stage = Journal(Path("runs/evaluate/0123/tracked/other"))
    used = {"seed": "0", "priors.top.train.steps": "100"}
    stage.begin("other", "evaluate", "fingerprint", used, {}, inputs={}, parent=parent)
    stage.image("samples", png("green"), 0)
    Path("metrics/evaluate.json").write_text('{"psnr": 25.0}')
    stage.end("FINISHED", outputs=[Path("metrics/evaluate.json")])
    cached = Journal(Path("runs/pipeline") / parent / "cached" / "vqvae")
    cached.begin("cached", "vqvae", "fingerprint", {}, {}, inputs={}, parent=parent, cached=True)
    cached.metrics({"train/mse": 0.5}, 10)
    cached.metrics({"psnr": 24.0}, 0)
    cached.end("FINISHED")


@pytest.mark.parametrize("name", [KEY, "emoji, more steps"])
def test_tracked_run_is_read_from_its_journals(project, name):
    """By its key or its name in MLflow. Settings in a journal are texts of Python values.

    A setting that was edited before its stage began is the one of the stage.
    """
    write_journals(KEY)
    run = find(name)
    assert run.settings == {
        "priors.top.train.steps": 100,
        "sample.classes": ["a", "b"],
        "dataset.name": "emoji",
        "seed": 0,
    }
    assert run.numbers == {"evaluate.psnr": 25.0, "vqvae.psnr": 24.0}
    assert run.pictures == {"samples": png("green")}


def test_unknown_name_is_refused_with_names_that_exist(project):
    """A run, an experiment, or a revision."""
    write_journals(KEY)
    with pytest.raises(UserError, match="nothing is not a run") as caught:
        find("nothing")
    assert "trunk" in caught.value.fix and KEY in caught.value.fix and caught.value.code == 2


def test_name_longer_than_any_file_name_is_refused(project):
    """The operating system refuses to look for such a folder."""
    with pytest.raises(UserError, match="is not a run") as caught:
        command.run("a" * 300, WORKSPACE, out=None, as_json=False)
    assert caught.value.code == 2


def test_damaged_dvc_lock_is_refused(project):
    """In the workspace its file is named, in a revision the commit: another one may be valid."""
    Path("dvc.lock").write_text("stages: [1]\n")
    with pytest.raises(UserError, match=r"^dvc.lock is not valid: stages must be a mapping\.") as caught:
        find(WORKSPACE)
    assert caught.value.where == "dvc.lock" and "git checkout dvc.lock" in caught.value.fix
    subprocess.run([*GIT, "commit", "-qam", "damaged"], check=True)
    with pytest.raises(UserError, match=r"^dvc.lock is not valid") as caught:
        find("trunk")
    assert caught.value.where.startswith("commit ") and "another revision" in caught.value.fix
    Path("dvc.lock").unlink()
    assert find(WORKSPACE).notes == []


def test_numbers_of_one_run_come_last_and_are_counted():
    """A revision from before a metric was added has fewer numbers."""
    a = ComparedRun("a", "", {}, {"evaluate.old": 1.0, "evaluate.psnr": 20.0})
    comparison = compare(a, ComparedRun("b", "", {}, {"evaluate.psnr": 0.0, "evaluate.new": 1.0}))
    cells = [(number.name, *number.cells()) for number in comparison.numbers]
    assert cells == [
        ("evaluate.psnr", "20", "0", "-20", "-100.0%"),
        ("evaluate.old", "1", "-", "", ""),
        ("evaluate.new", "-", "1", "", ""),
    ]


def test_text_json_and_page_have_the_same_facts(project, capsys, monkeypatch):
    """The path of the page is printed last."""
    monkeypatch.setattr(command, "find", find)
    assert command.run("trunk", WORKSPACE, out=None, as_json=False) == 0
    text = capsys.readouterr().out
    assert "  priors.top.train.steps 8 -> 12\n" in text and "evaluate.psnr  20  21.5   +1.5  +7.5%" in text
    assert text.splitlines()[-1] == "runs/compare/trunk-workspace.html"
    command.run("trunk", WORKSPACE, out=Path("pages/page.html"), as_json=True)
    facts = json.loads(capsys.readouterr().out)
    assert facts["settings"] == [{"key": "priors.top.train.steps", "a": 8, "b": 12}]
    assert facts["numbers"][0] == {"name": "evaluate.psnr", "a": 20.0, "b": 21.5, "difference": 1.5}
    page = Path("pages/page.html").read_text().replace("<wbr>", "")
    assert all(
        word in page for word in ("priors.top.train.steps", "+7.5%", "data:image/png;base64,", "Reconstructions")
    )
    with pytest.raises(UserError, match=r"--out must be an \.html file"):
        command.run("trunk", WORKSPACE, out=Path("page.png"), as_json=False)


def test_what_differs_comes_first():
    """Equal numbers are counted in the text, and folded on the page, after the settings that differ."""
    numbers = {"evaluate.equal": 1.0, "evaluate.psnr": 20.0}
    a = ComparedRun("a", "", {"seed": 0}, numbers, {"samples": png("red")})
    b = ComparedRun("b", "", {"seed": 0}, {**numbers, "evaluate.psnr": 21.0})
    comparison = compare(a, b)
    assert [number.name for number in comparison.numbers] == ["evaluate.psnr", "evaluate.equal"]
    text = command.format_text(comparison, Path("page.html"))
    assert "evaluate.psnr" in text and "evaluate.equal" not in text
    assert "\n1 number is equal.\n" in text and "more number" not in text
    page = compare_page.render(comparison)
    parts = ["No settings differ.", ".<wbr>psnr", "<summary>1 equal number<", ".<wbr>equal", "<h2>Samples"]
    assert sorted(parts, key=page.index) == parts


def test_page_escapes_names():
    """A name may be any text of a branch or a run."""
    run = ComparedRun("<script>a</script>", "", {}, {})
    assert "<script>" not in compare_page.render(compare(run, run))


@needs_chromium
def test_page_requests_nothing_and_fits_a_phone(project, tmp_path_factory):
    """The page opens offline, and neither it nor a table with long names scrolls sideways at 390 pixels."""
    folder = tmp_path_factory.mktemp("chromium")
    page = folder / "page.html"
    a, b = find("trunk"), find(WORKSPACE)
    a.numbers["evaluate.reconstruction.validation.perceptual_distance.of_all_levels"] = 123.456
    b.numbers["evaluate.reconstruction.validation.perceptual_distance.of_all_levels"] = 234.567
    comparison = compare(a, b)
    page.write_text(compare_page.render(comparison))
    assert not requested_hosts(folder, page)
    outer = folder / "frame.html"
    set_title = (
        "const page = this.contentDocument;"
        "document.title = Math.max(page.documentElement.scrollWidth, ...[...page.querySelectorAll('.wide')].map("
        "table => table.scrollWidth))"
    )
    outer.write_text(f'<iframe width="390" height="900" src="{page.as_uri()}" onload="{set_title}"></iframe>')
    title = re.search(r"<title>(\d+)</title>", document(folder, outer, "--allow-file-access-from-files"))
    assert title and 300 < int(title[1]) <= 390


def test_report_below_the_root_is_a_report_without_a_project(tmp_path, monkeypatch):
    """A folder that is mounted at the root has one parent only."""
    (tmp_path / "report.html").write_text("<html>")
    monkeypatch.setattr(Path, "resolve", lambda self, strict=False: Path("/report"))
    assert compared_runs.find(str(tmp_path)).description == "report"


@pytest.mark.parametrize("data", [png("red")[:60], b"GIF89a", b"\x89PNG\r\n\x1a\n", b"<html>"])
def test_damaged_picture_is_a_note(project, data):
    """The page has the other pictures."""
    Path("artifacts/report/samples.png").write_bytes(data)
    run = find(WORKSPACE)
    assert list(run.pictures) == ["reconstructions"]
    assert [str(note) for note in run.notes] == [f"Pictures damaged of {WORKSPACE}: samples."]
    assert "data:image/png" in compare_page.render(compare(run, find("trunk")))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_number_that_is_not_finite_has_no_difference(value):
    """NaN is a value of a metric that could not be computed."""
    assert MetricPair("psnr", 1.0, value).cells() == ("1", f"{value:g}", "", "")
    assert MetricPair("psnr", value, value).cells() == (f"{value:g}", f"{value:g}", "", "")


@pytest.mark.parametrize(
    ("b", "percent"), [(1.5, "+50.0%"), (0.9, "-10.0%"), (0.99974, "-0.03%"), (2000.0, "+199900.0%")]
)
def test_small_difference_is_not_rounded_to_zero(b, percent):
    """Equal numbers are called equal; "-0.0%" would say neither."""
    assert MetricPair("psnr", 1.0, b).cells()[3] == percent


def test_credentials_are_masked(capsys, project):
    """Neither the JSON nor the page shows the password of a URL."""
    with Path("params.yaml").open("a") as file:
        file.write("cluster:\n  storage: s3://AKIA:hunter2@bucket/p\n")
    for as_json in (True, False):
        command.run("trunk", WORKSPACE, out=Path("page.html"), as_json=as_json)
        text = capsys.readouterr().out + Path("page.html").read_text()
        assert "hunter2" not in text and text.count("s3://***@bucket/p") == 2
