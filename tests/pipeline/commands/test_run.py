"""Tests of `vqvae2 run`."""

import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest

from pipeline import dvc, dvc_yaml, params, reconstruction_page, stage_runner
from pipeline.commands import run
from pipeline.fingerprint import work_folder
from stages.errors import UserError
from stages.tracking.journal import JOURNAL_FILE, end_status
from stages.tracking.tracker import track_pipeline
from tests.mounts import mount_prefix

STAGES = ["shard", "vqvae", "codes", "prior_top", "prior_bottom", "sample", "evaluate"]


def _files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return the times and contents of a project's files, without DVC's temporary files and without linked code."""
    paths = (path for path in folder.rglob("*") if path.relative_to(folder).parts[:2] != (".dvc", "tmp"))
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) if path.is_file() else (0, b"")
        for path in paths
        if not path.is_symlink()
    }


@pytest.mark.parametrize("overrides", [[], ["-S", "experiment=smoke"]], ids=["params", "composed"])
@pytest.mark.parametrize("versions", [None, 'shard: "0123456789abcdef"\n'], ids=["new", "older_code"])
def test_dry_run_prints_reasons_and_changes_nothing(project, overrides, versions):
    """Settings, result versions and locks are as before; DVC itself writes only below .dvc/tmp."""
    if versions:
        (project.folder / "result_versions.yaml").write_text(versions)
    before = _files(project.folder)
    done = project.command("run", "--dry-run", *overrides)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[:-1]] == STAGES
    assert "shard         would run: it has not run yet" in done.stdout
    assert _files(project.folder) == before


def test_dry_run_keeps_the_journals_of_earlier_runs(project):
    """Only what it has created itself is deleted."""
    (project.folder / "runs/pipeline").mkdir(parents=True)
    assert project.command("run", "--dry-run", "-S", "experiment=smoke").returncode == 0
    assert (project.folder / "runs/pipeline").is_dir() and (project.folder / "runs/lock").is_file()


def test_refused_run_changes_nothing(project):
    """Neither settings nor result versions."""
    before = _files(project.folder)
    done = project.command("run", "-S", "experiment=smoke", "-S", "sample.classes=[flag]")
    assert done.returncode == 2, done.stderr
    after = _files(project.folder)
    assert {name for name in after if before.get(name) != after[name]} == {"runs", "runs/lock"}


@pytest.mark.parametrize("overrides", [[], ["experiment=smoke"]], ids=["params", "composed"])
def test_settings_edited_during_a_dry_run_stay(current_project, overrides):
    """Only what the command itself has written is taken back."""
    with run._apply_settings(overrides, keep=False):
        params.FILE.write_text("seed: 4242\n")
    assert params.FILE.read_text() == "seed: 4242\n"


def test_status_changes_nothing(project):
    """The result versions that it compares are not written."""
    (project.folder / "result_versions.yaml").write_text('shard: "0123456789abcdef"\n')
    before = _files(project.folder)
    assert project.command("status").returncode == 0
    assert _files(project.folder) == before


def test_run_without_quantization_ends_after_the_vqvae(project):
    """One line says before the training that there will be no codes, priors and samples."""
    done = project.command("run", "--dry-run", "-S", "vqvae.quantizer.mode=none")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[:-1]] == ["shard", "vqvae"]
    assert reconstruction_page.NOTICE in done.stderr


@pytest.mark.parametrize(
    ("arguments", "stages"),
    [
        (["--stage", "prior_bottom"], ["shard", "vqvae", "codes", "prior_bottom"]),
        (["--stage", "codes", "-s", "prior_top"], ["shard", "vqvae", "codes", "prior_top"]),
    ],
    ids=["one", "two"],
)
def test_stage_includes_its_dependencies(project, arguments, stages):
    """--stage is repeatable; the dependencies of each stage are included."""
    done = project.command("run", "--dry-run", *arguments)
    assert [line.split()[0] for line in done.stdout.splitlines()[:-1]] == stages


def test_only_a_stage_without_its_inputs_is_refused(project):
    """Running the same command again would not help; the message names the stage that writes the input."""
    done = project.command("run", "--only", "--stage", "sample")
    assert done.returncode == 4
    assert "sample reads artifacts/vqvae, which does not exist." in done.stderr
    assert "fix: Run: vqvae2 run --stage vqvae" in done.stderr


def test_read_only_project_is_refused_at_once(project):
    """Every command that writes prints one error without a traceback."""
    mounted = mount_prefix('mount --bind . . && mount -o remount,bind,ro . && cd "$PWD"')
    program = [*mounted, sys.executable, "-c", "from pipeline.cli import main; main()"]
    for arguments in (["run"], ["run", "-S", "experiment=smoke"], ["config", "seed=1", "--write"]):
        done = subprocess.run([*program, *arguments], cwd=project.folder, capture_output=True, text=True)
        assert done.returncode == 3 and done.stderr == (
            "error: Read-only file system.\n  in: runs\n  fix: Choose another path: this one is mounted read-only.\n"
        )
    done = subprocess.run([*program, "doctor"], cwd=project.folder, capture_output=True, text=True)
    assert done.returncode == 3 and "This folder is not writable" in done.stdout


SLOW = "import time\ntime.sleep(60)\n"
SLOW_DVC = "from pipeline import cli, dvc; dvc.COMMAND[1:] = ['slow.py']; cli.main()"


@pytest.fixture
def start_run(project):
    """Return a function that starts a run with another seed and returns while it waits for DVC's status."""
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
def test_run_stopped_before_its_first_stage_restores_params_yaml(project, start_run, number):
    """Further signals do not interrupt the restoring."""
    before = (project.folder / "params.yaml").read_bytes()
    process = start_run()
    for stop_signal in (number, signal.SIGHUP, signal.SIGINT):
        process.send_signal(stop_signal)
        time.sleep(0.01)
    process.communicate(timeout=20)
    assert process.returncode in {128 + stop_signal for stop_signal in (number, signal.SIGHUP, signal.SIGINT)}
    assert (project.folder / "params.yaml").read_bytes() == before


def test_stopped_run_prints_one_line(start_run):
    """The exit status has the number of the signal."""
    process = start_run()
    process.terminate()
    assert process.communicate(timeout=20)[1] == "Stopped by SIGTERM. Run the same command again to resume.\n"
    assert process.returncode == 143


def test_run_under_nohup_survives_its_terminal(start_run):
    """A run that was started with SIGHUP ignored keeps ignoring it."""
    process = start_run(ignored=[signal.SIGHUP])
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.terminate()
    assert process.wait(20) == 143


def test_failure_without_a_stage_error_is_printed(capsys):
    """If no stage has recorded a status, the run prints that DVC failed."""
    assert run.failure_status(dvc.Outcome(status=255), 0) == 1
    assert capsys.readouterr().err == "DVC failed. Run the same command again to resume.\n"


def test_exit_status_is_that_of_the_failed_stage(capsys):
    """The stage has printed its error already."""
    assert run.failure_status(dvc.Outcome(status=255), 4) == 4
    assert capsys.readouterr().err == ""


def test_killed_dvc_is_an_error():
    """DVC cannot print anything itself then."""
    with pytest.raises(UserError, match=r"DVC was killed by SIGKILL\.") as caught:
        run.failure_status(dvc.Outcome(status=-signal.SIGKILL), 0)
    assert "Run the same command again" in caught.value.fix


def test_successful_run_deletes_parts(current_project, monkeypatch):
    """It also deletes the marker of a forced restart. A failed run keeps both, and other work folders are kept.

    The stage may have run before an interruption: then it is unchanged now.
    """
    settings = params.load()
    work = work_folder(Path("runs/shard"), dvc_yaml.stages(params.read())["shard"], settings)
    other = Path("runs/shard/other/parts")
    other.mkdir(parents=True)
    monkeypatch.setattr(dvc, "out_of_date_reasons", lambda *_, **__: {"shard": ["requested"]})
    monkeypatch.setattr("stages.tracking.tracker.track_pipeline", lambda *_: nullcontext("runs/pipeline/key"))
    for failed, ran, unchanged in ((True, ["shard"], []), (False, ["shard"], []), (False, [], ["shard"])):
        (work / "parts").mkdir(parents=True, exist_ok=True)
        (work / stage_runner.RESTARTED_MARKER).touch()
        outcome = dvc.Outcome(status=int(failed), ran=ran, unchanged=unchanged)
        monkeypatch.setattr(dvc, "run_repro", lambda *_, outcome=outcome, **__: outcome)
        assert run.run() == failed
        assert (work / "parts").exists() == (work / stage_runner.RESTARTED_MARKER).exists() == failed
    assert other.exists()


@pytest.mark.parametrize("status", [0, 1])
def test_result_missing_from_the_cache_fails_the_run(status):
    """The only copy would be in artifacts/. The last stage of a failed run has no result."""
    outcome = dvc.Outcome(status, ran=["shard", "vqvae", "prior@top"])
    checked = []

    def missing_from_cache(names):
        checked.append(list(names))
        return ["shard", "vqvae"]

    with pytest.raises(UserError, match=r"DVC's cache does not have the results of shard, vqvae; see") as caught:
        run.require_cached(outcome, missing_from_cache)
    assert checked == [outcome.ran[:2] if status else outcome.ran]
    assert caught.value.where == f"{Path.cwd()}: dvc cache dir" and caught.value.code == 3
    assert caught.value.fix == ("Free space there, but not in artifacts/ or runs/, then run: dvc commit -f shard vqvae")


def test_unknown_state_of_the_cache_does_not_fail_the_run(capsys):
    """Another dvc process may hold DVC's lock."""

    def missing_from_cache(names):
        raise UserError("DVC is busy.", where=".", fix="Wait.")

    run.require_cached(dvc.Outcome(ran=["shard"]), missing_from_cache)
    assert capsys.readouterr().err == "note: could not check that DVC's cache has all results. DVC is busy.\n"


class _NoUpload:
    """Uploader that sends nothing."""

    sent_points = 0

    def __init__(self, folder: Path, *, recreate_deleted: bool = True):
        pass

    def flush(self) -> None:
        pass

    def missing_points(self) -> int:
        return 0


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        (dvc.Outcome(), "FINISHED"),
        (dvc.Outcome(status=1), "FAILED"),
        (dvc.Outcome(status=1, stop_signal=signal.SIGTERM), "KILLED"),
        (dvc.Outcome(status=0, stop_signal=signal.SIGINT), "KILLED"),
    ],
)
def test_stopped_run_is_tracked_as_killed(tmp_path, monkeypatch, outcome, status):
    """Its stage is, too. A run that fails by itself is tracked as failed."""
    monkeypatch.chdir(tmp_path)
    with suppress(run.ReproFailedError, run.ReproStopped), track_pipeline({}, {}, uploader=_NoUpload) as folder:
        run.require_finished(outcome)
    assert end_status(Path(folder) / JOURNAL_FILE) == status
