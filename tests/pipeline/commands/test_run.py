"""`vqvae2 run` and its neighbours, as a person calls them."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline import dvc, dvc_yaml, ownership, params, preflight, shared_cluster, stage_runner
from pipeline.cli import app
from pipeline.commands import inference, status
from pipeline.commands import run as run_module
from stages.errors import UserError
from stages.formats import artifact
from stages.tracking.tracker import SyncResult
from tests.mounts import within

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


def test_several_stages_can_be_asked_for(project):
    """--stage again adds a stage; what each needs comes along."""
    done = project.command("run", "--dry-run", "--stage", "codes", "-s", "prior_top")
    assert [line.split()[0] for line in done.stdout.splitlines()[:-1]] == ["shard", "vqvae", "codes", "prior_top"]


def test_classes_to_sample_are_those_of_the_images(project, monkeypatch):
    """They are read off the shards where these stay, and off the names in the source where shards are to be made."""
    monkeypatch.chdir(project.folder)
    settings = params.load()
    settings = replace(settings, sample=replace(settings.sample, classes=("flags",)))
    everything, later = list(STAGES), STAGES[1:]
    preflight.check(settings, everything, "params.yaml")
    preflight.check(settings, later, "params.yaml")  # no shards to look at
    with artifact.commit_folder(Path("artifacts/shards"), "shards", {"classes": ["cat", "dog"]}):
        pass
    preflight.check(settings, everything, "params.yaml")
    preflight.check(settings, STAGES[:2], "params.yaml")  # nothing is sampled
    with pytest.raises(UserError, match=r"no class 'flags'[\s\S]*params.yaml: sample.classes\n  fix: .*cat, dog"):
        preflight.check(settings, later, "params.yaml")
    with artifact.commit_folder(
        Path("artifacts/shards"), "shards", {"classes": [f"n{number}" for number in range(1000)]}
    ):
        pass
    with pytest.raises(UserError, match=r"fix: Use any of: n0, n1, .*, n19 and 980 more"):
        preflight.check(settings, later, "params.yaml")
    unlabelled = replace(settings, dataset=replace(settings.dataset, labels="none"))
    with pytest.raises(UserError, match=r"no classes to draw[\s\S]*fix: Leave sample.classes empty"):
        preflight.check(unlabelled, everything, "params.yaml")


def test_drawing_by_hand_follows_the_settings(project, monkeypatch):
    """What `sample` is not told of temperature, top-k and top-p is as in params.yaml."""
    monkeypatch.chdir(project.folder)
    project.edit(lambda data: data["sample"].update(temperature=0.7, top_k=5, classes=["flags"]))
    drawn = []
    monkeypatch.setattr(inference, "sample", lambda out, config, *, seed: drawn.append((config, seed)))
    runner = CliRunner()
    assert runner.invoke(app, ["sample", "drawn"]).exit_code == 0
    assert runner.invoke(app, ["sample", "drawn", "--top-k", "0", "--top-p", "0.5", "-c", "food"]).exit_code == 0
    settled = params.load().sample
    assert drawn == [
        (replace(settled, count=16, classes=()), 0),
        (replace(settled, count=16, classes=("food",), top_k=0, top_p=0.5), 0),
    ]


@pytest.mark.parametrize(("missing", "trouble", "status"), [(0, "", 0), (2, "", 1), (2, "it refused a name", 1)])
def test_what_mlflow_did_not_take_is_told(monkeypatch, missing, trouble, status):
    """With what was sent, what it named, and the exit status of what is not whole."""
    monkeypatch.setattr("stages.tracking.tracker.sync", lambda: SyncResult(1, 0, 3, missing, trouble))
    done = CliRunner().invoke(app, ["sync-metrics"])
    assert done.exit_code == status
    assert done.stdout == f"3 points sent, {missing} missing; 1 runs whole, 0 still running\n"
    told = (
        f"error: MLflow did not take all: {trouble}.\n  in: runs/\n"
        "  fix: Mend what it names, then run: vqvae2 sync-metrics. It sends what is still missing.\n"
    )
    assert done.stderr == (told if trouble else "")


def test_status_is_readable_by_programs(project):
    """--json gives each stage's state and reasons."""
    rows = json.loads(project.command("status", "--json").stdout)
    assert [row["stage"] for row in rows] == STAGES
    assert all(row["state"] == "out of date" and row["reasons"] == ["it has not run yet"] for row in rows)


def test_who_reads_the_first_line_only_sees_no_error(project):
    """`vqvae2 config | head -1`, as it were: the reader is gone before anything is printed."""
    reader, writer = os.pipe()
    os.close(reader)
    program = [sys.executable, "-c", "from pipeline.cli import main; main()", "config"]
    done = subprocess.run(program, cwd=project.folder, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


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


def test_a_copy_of_the_project_runs_its_own_code(tmp_path):
    """A queued experiment runs in a copy of the project, and so must its code."""
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "__init__.py").touch()
    (tmp_path / "pipeline" / "cli.py").write_text("def main():\n    print('the code of the copy')\n")
    program = Path(sys.executable).with_name("vqvae2")
    done = subprocess.run([program, "status"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "the code of the copy\n", done.stderr


def test_a_project_that_is_mounted_read_only_is_refused_at_once(project):
    """Whatever is asked of it: one letter, and no traceback."""
    mounted = within('mount --bind . . && mount -o remount,bind,ro . && cd "$PWD"')
    program = [*mounted, sys.executable, "-c", "from pipeline.cli import main; main()"]
    for arguments in (["run"], ["run", "-S", "experiment=smoke"], ["config", "seed=1", "--write"]):
        done = subprocess.run([*program, *arguments], cwd=project.folder, capture_output=True, text=True)
        assert done.returncode == 3 and done.stderr == (
            "error: Read-only file system.\n  in: runs\n  fix: Choose another place: this one is mounted read-only.\n"
        )
    done = subprocess.run([*program, "doctor"], cwd=project.folder, capture_output=True, text=True)
    assert done.returncode == 3 and "this folder cannot be written" in done.stdout


SLOW = "import time\ntime.sleep(60)\n"
SLOW_DVC = "from pipeline import cli, dvc; dvc.COMMAND[1:] = ['slow.py']; cli.main()"


@pytest.fixture
def waiting(project):
    """Start a run with another seed, and yield it while it asks DVC what is out of date."""
    before = (project.folder / "params.yaml").read_bytes()
    (project.folder / "slow.py").write_text(SLOW)

    def start(ignored=()):
        def prepare():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)

        program = [sys.executable, "-c", SLOW_DVC, "run", "-S", "seed=7"]
        process = subprocess.Popen(program, cwd=project.folder, stderr=subprocess.PIPE, text=True, preexec_fn=prepare)
        while (project.folder / "params.yaml").read_bytes() == before:
            time.sleep(0.05)
        return process

    return start


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_settings_of_a_run_stopped_before_it_begins_are_taken_back(project, waiting, number):
    """A signal while DVC is asked what is out of date, and more of them: params.yaml is as it was."""
    before = (project.folder / "params.yaml").read_bytes()
    process = waiting()
    for each in (number, signal.SIGHUP, signal.SIGINT):
        process.send_signal(each)
        time.sleep(0.01)
    process.communicate(timeout=20)
    assert process.returncode in {128 + each for each in (number, signal.SIGHUP, signal.SIGINT)}
    assert (project.folder / "params.yaml").read_bytes() == before


def test_a_run_that_is_stopped_says_so_in_one_line(waiting):
    """And ends with the signal's number."""
    process = waiting()
    process.terminate()
    assert process.communicate(timeout=20)[1] == "Stopped by SIGTERM. The same command resumes.\n"
    assert process.returncode == 143


def test_a_run_under_nohup_outlives_its_terminal(waiting):
    """What was started to ignore SIGHUP goes on ignoring it."""
    process = waiting(ignored=[signal.SIGHUP])
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.terminate()
    assert process.wait(20) == 143


def test_a_run_that_dvc_gives_up_says_so(project, monkeypatch, capsys):
    """Where no stage has said why."""
    monkeypatch.chdir(project.folder)
    monkeypatch.setattr(run_module.dvc, "reasons", lambda *_, **__: {"shard": ["asked for"]})
    monkeypatch.setattr(run_module.dvc, "reproduce", lambda *_, **__: dvc.Outcome(status=255))
    monkeypatch.setattr("stages.tracking.tracker.parent_run", lambda *_: nullcontext("runs/pipeline/key"))
    assert run_module.run() == 1
    assert capsys.readouterr().err.endswith(
        "DVC did not get to the end. The same command goes on from what is saved.\n"
    )


def test_parts_go_once_dvc_has_taken_note_of_the_whole(project, monkeypatch):
    """Not before, and none of other settings; a forced run that has got to its end is no longer one that goes on."""
    monkeypatch.chdir(project.folder)
    stage = dvc_yaml.stages(params.read())["shard"]
    work = Path("runs/shard", run_module._made_of(stage, params.load())[1][:16])
    other = Path("runs/shard/other/parts")
    other.mkdir(parents=True)
    monkeypatch.setattr(run_module.dvc, "reasons", lambda *_, **__: {"shard": ["asked for"]})
    monkeypatch.setattr("stages.tracking.tracker.parent_run", lambda *_: nullcontext("runs/pipeline/key"))
    for failed in (True, False):
        (work / "parts").mkdir(parents=True, exist_ok=True)
        (work / stage_runner.RESTARTED_MARKER).touch()
        outcome = dvc.Outcome(status=int(failed), ran=["shard"])
        monkeypatch.setattr(run_module.dvc, "reproduce", lambda *_, outcome=outcome, **__: outcome)
        assert run_module.run() == failed
        assert (work / "parts").exists() == (work / stage_runner.RESTARTED_MARKER).exists() == failed
    assert other.exists()


@pytest.mark.parametrize("status", [0, 1])
def test_what_dvc_could_not_put_into_its_cache_fails_a_run(project, monkeypatch, capsys, status):
    """A full disk, say: the result is in one place alone. A stage that failed has made nothing to be kept."""
    monkeypatch.chdir(project.folder)
    monkeypatch.setattr(run_module.dvc, "reasons", lambda *_, **__: {"vqvae": ["asked for"]})
    monkeypatch.setattr("stages.tracking.tracker.parent_run", lambda *_: nullcontext("runs/pipeline/key"))
    outcome = dvc.Outcome(status, ran=["shard", "vqvae", "prior@top"])
    monkeypatch.setattr(run_module.dvc, "reproduce", lambda *_, **__: outcome)
    asked = []
    monkeypatch.setattr(run_module.dvc, "uncached", lambda names: asked.append(list(names)) or ["shard", "vqvae"])
    with pytest.raises(UserError, match=r"DVC's cache lacks what shard, vqvae made; DVC says above why\.") as caught:
        run_module.run()
    assert asked == [outcome.ran[:2] if status else outcome.ran]
    assert caught.value.where == f"{project.folder}: dvc cache dir" and caught.value.code == 3
    assert caught.value.fix == ("Make room there, but not in artifacts/ or runs/, then run: dvc commit -f shard vqvae")

    def unknown(names):
        raise UserError("DVC is busy.", where=".", fix="Wait.")

    monkeypatch.setattr(run_module.dvc, "uncached", unknown)
    assert run_module.run() == status
    assert "note: whether DVC's cache has what was made is not known. DVC is busy." in capsys.readouterr().err


def test_status_tells_what_runs_while_dvc_is_busy(project, monkeypatch, capsys):
    """DVC answers nothing then; of the stage that runs, its lock tells."""

    def busy(stages):
        raise UserError(f"{dvc.BUSY}: PID 7.", where=".", fix="Wait.", code=3)

    monkeypatch.chdir(project.folder)
    monkeypatch.setattr("pipeline.commands.status.dvc.reasons", busy)
    with pytest.raises(UserError, match="PID 7"):
        status.show(as_json=False)
    with ownership.exclusive_lock(Path("runs/vqvae")):
        assert status.show(as_json=True) == 0
    found = {row["stage"]: (row["state"], row["reasons"]) for row in json.loads(capsys.readouterr().out)}
    assert found["shard"] == ("unknown", ["DVC is busy"])
    assert found["vqvae"][0] == "running" and f"PID {os.getpid()}" in found["vqvae"][1][0]


def test_a_long_name_of_the_folder_for_temporary_files_is_no_matter(tmp_path, monkeypatch):
    """A socket's path must be short."""
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with shared_cluster.SharedCluster() as meeting:
        assert meeting.status() == 0 and meeting.folder.is_dir()
    assert not meeting.folder.exists()
