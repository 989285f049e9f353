"""From a stage's name to a call."""

import errno
import fcntl
import inspect
import os
import signal
import subprocess
import sys
import threading
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

import pytest
import ray.exceptions

from pipeline import dvc_yaml, error_report, fingerprint, ownership, params, stage_runner
from stages import shard
from stages.config import ClusterConfig
from stages.errors import UserError
from stages.formats import artifact
from stages.runtime.context import Reporter, StageContext

ROOT = Path(__file__).parents[2]
SETTINGS = params.load(ROOT / "params.yaml")
STAGES = dvc_yaml.stages(params.read(ROOT / "params.yaml"), ROOT / "dvc.yaml")


@pytest.fixture
def here(project, monkeypatch):
    """A project as the current folder, with shards in place."""
    monkeypatch.chdir(project.folder)
    with artifact.commit_folder(Path("artifacts/shards"), "shards", {}) as folder:
        (folder / "train-00000.tar").write_bytes(b"images")
    return project


def fingerprint() -> str:
    settings = params.load()
    stage = dvc_yaml.stages(params.read())["vqvae"]
    return fingerprint.fingerprint_of(stage, settings, fingerprint.digests(stage, settings), fingerprint.code_of(stage))


def test_a_stage_is_found_by_either_name():
    """prior_top on the command line is prior@top in DVC."""
    assert dvc_yaml.find("prior_top", STAGES) is dvc_yaml.find("prior@top", STAGES) is STAGES["prior@top"]
    with pytest.raises(UserError, match="shard, vqvae, codes, prior_top, prior_bottom, sample, evaluate"):
        dvc_yaml.find("priors", STAGES)


def test_templates_are_filled_in():
    """A prior's stage has its own level's paths and its own network's file."""
    stage = STAGES["prior@top"]
    assert stage.outs == ("artifacts/priors/top",) and stage.params == ("priors.top", "seed")
    assert f"models/priors/{SETTINGS.priors['top'].network.name}.py" in stage.deps
    assert STAGES["shard"].deps[0] == SETTINGS.dataset.source


def test_equal_inputs_have_equal_fingerprints_and_a_setting_changes_it(here):
    """The fingerprint follows settings that the stage watches, and no other."""
    before = fingerprint()
    here.edit(lambda data: data["cluster"].update(workers=2, cpus_per_worker=1.0))
    here.edit(lambda data: data["sample"].update(count=3))
    assert fingerprint() == before
    here.edit(lambda data: data["vqvae"]["quantizer"].update(beta=0.5))
    assert fingerprint() != before


def test_other_inputs_have_another_fingerprint(here):
    """One changed byte in an input makes another run."""
    before = fingerprint()
    with artifact.commit_folder(Path("artifacts/shards"), "shards", {}) as folder:
        (folder / "train-00000.tar").write_bytes(b"imagez")
    assert fingerprint() != before


def test_settings_edited_while_a_stage_runs_are_not_taken_for_its_own(here, monkeypatch):
    """DVC would note them as what the result was made with; those of other stages are no matter."""
    edits = [("sample", {"count": 3}), ("dataset", {"image_size": 64, "resize_mode": "pad"})]
    settled = (params.load().dataset.image_size, params.load().dataset.resize_mode)

    def edited(*_, dataset, run):
        assert (dataset.image_size, dataset.resize_mode) == settled
        section, values = edits.pop(0)
        here.edit(lambda data: data[section].update(values))

    edited.__signature__ = inspect.signature(shard.run)
    monkeypatch.setattr(shard, "run", edited)
    monkeypatch.setattr(stage_runner.tracking, "open_run", lambda *_, **__: nullcontext(Reporter()))
    stage_runner._run("shard", "", Path("runs/shard"))
    with pytest.raises(UserError, match=r'dataset.image_size \d+ -> 64, dataset.resize_mode "crop" -> "pad"\.'):
        stage_runner._run("shard", "", Path("runs/shard"))


def test_code_edited_while_a_stage_runs_is_named(here, monkeypatch):
    """What training has made is kept; that DVC takes it for the edited code's is said, with what to do."""
    code, notes = Path("stages/shard.py"), []
    code.parent.unlink()  # a link to the code itself
    code.parent.mkdir()
    code.write_text("# as it was\n")

    def edited(*_, dataset, run):
        code.write_text("# as it is\n")

    edited.__signature__ = inspect.signature(shard.run)
    reporter = Reporter()
    monkeypatch.setattr(reporter, "note", notes.append)
    monkeypatch.setattr(shard, "run", edited)
    monkeypatch.setattr(stage_runner.tracking, "open_run", lambda *_, **__: nullcontext(reporter))
    stage_runner._run("shard", "", Path("runs/shard"))
    (told,) = notes
    assert told.startswith("Edited while shard ran: stages/shard.py. ")
    assert told.endswith("vqvae2 run --force --stage shard")
    stage_runner._run("shard", "", Path("runs/shard"))
    assert notes == [told]


def test_a_stage_is_owned_by_one_process(tmp_path):
    """The second owner is refused and told who the first is; afterwards the way is free."""
    with ownership.exclusive_lock(tmp_path / "vqvae"):
        code = "import sys; from pathlib import Path; from pipeline.ownership import exclusive_lock\n"
        code += f"with exclusive_lock(Path({str(tmp_path)!r}, 'vqvae')): sys.exit(9)"
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        assert f"Another process runs this stage: PID {os.getpid()} on " in second.stderr
    with ownership.exclusive_lock(tmp_path / "vqvae"):
        pass


def test_an_owner_that_has_not_yet_said_who_it_is_holds_the_stage_too(tmp_path):
    """Between taking the lock and writing into it."""
    with (tmp_path / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert ownership.owner(tmp_path) == "it has just started"
        with (
            pytest.raises(UserError, match="this stage: it has just started") as caught,
            ownership.exclusive_lock(tmp_path),
        ):
            pass
        assert caught.value.where == str(tmp_path / "lock") and caught.value.fix == ownership.WAIT


def test_a_traceback_that_finds_no_room_here_goes_elsewhere(tmp_path, capsys, monkeypatch):
    """A disk that is full or read-only is no reason to lose it."""
    (tmp_path / "file").touch()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(stage_runner.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    assert error_report.report(KeyError("middle"), tmp_path / "file") == 1
    log = tmp_path / "tmp" / "vqvae2-error.log"
    assert capsys.readouterr().err == f"error: KeyError: 'middle'\n  traceback: {log}\n"
    assert "KeyError" in log.read_text()


@pytest.mark.parametrize("number", [errno.EEXIST, errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT])
def test_a_path_that_cannot_be_written_is_named(number, tmp_path, capsys):
    """What the system says of a path is said as a letter, with what to do."""
    assert error_report.report(OSError(number, os.strerror(number), "drawn/000000.png"), tmp_path) == 3
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {os.strerror(number)}.\n  in: drawn/000000.png\n  fix: ")


def test_a_mistake_is_found_inside_what_ray_wraps_around_it(tmp_path, capsys):
    """The user sees the letter, not the wrapping."""
    mistake = UserError("The image is blue.", where="7.png", fix="Paint it.", code=4)
    wrapped = RuntimeError("worker failed")
    wrapped.worker_failures = {0: ValueError("outer")}
    wrapped.worker_failures[0].__cause__ = mistake
    assert error_report.report(wrapped, tmp_path) == 4
    assert capsys.readouterr().err == "error: The image is blue.\n  in: 7.png\n  fix: Paint it.\n"


def test_an_unexpected_error_of_a_worker_is_told_in_its_own_words(tmp_path, capsys):
    """What Ray makes of it begins with lines about Ray's processes; the file has all."""
    error = ray.exceptions.RayTaskError("map", "a traceback", ValueError("the middle is missing"), ip="127.0.0.1")
    assert error_report.report(error, tmp_path) == 1
    assert capsys.readouterr().err.startswith("error: ValueError: the middle is missing\n")
    assert "a traceback" in (tmp_path / "error.log").read_text()


def test_an_unexpected_error_is_one_line_and_a_file(tmp_path, capsys):
    """A traceback goes to a file whose path is printed."""
    try:
        raise KeyError("middle")
    except KeyError as error:
        assert error_report.report(error, tmp_path) == 1
    assert capsys.readouterr().err == f"error: KeyError: 'middle'\n  traceback: {tmp_path}/error.log\n"
    assert "Traceback" in (tmp_path / "error.log").read_text()


@pytest.mark.parametrize("kind", [partial(UserError, where="", fix=""), ValueError])
def test_no_error_shows_a_password(kind, tmp_path, capsys):
    """Whoever put the address with it into words, and also in the file, which may name what is no UTF-8."""
    error = kind("Nothing answers at s3://me:hunter2@bucket/runs.")
    error.__cause__ = OSError("\udcff.png")
    error_report.report(error, tmp_path)
    shown = capsys.readouterr().err + "".join(path.read_text() for path in tmp_path.iterdir())
    assert "s3://***@bucket/runs" in shown and "hunter2" not in shown


def test_a_stage_asked_to_stop_ends_even_if_the_request_gets_lost():
    """A library that swallows the exception cannot keep the process."""
    script = "import os, signal, time; from pipeline import stage_runner; stage_runner.PATIENCE_SECONDS = 0.2\n"
    script += "signal.signal(signal.SIGTERM, stage_runner._stop)\n"
    script += "try: os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)\nexcept BaseException: time.sleep(60)"
    done = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=30)
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stderr == "Stopped by SIGTERM. The same command resumes.\n"


def test_a_second_signal_ends_a_stage_at_once():
    """Whoever insists does not wait for what the first one has begun."""
    script = "import os, signal, time; from pipeline import stage_runner\n"
    script += "signal.signal(signal.SIGTERM, stage_runner._stop)\n"
    script += "try: os.kill(os.getpid(), signal.SIGTERM)\n"
    script += "except stage_runner.Stopped: os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=10)
    assert done.returncode == -signal.SIGTERM


@pytest.mark.parametrize("storage", ["", "memory://store"])
def test_what_is_made_afresh_is_forgotten_once(tmp_path, storage, capsys):
    """A forced run that did not get to its end goes on when it is started again; after one that did, all goes again."""
    run = StageContext("vqvae", "f" * 64, tmp_path, ClusterConfig(storage=storage))

    def put():
        for folder in (tmp_path / "step-000000005", tmp_path / "tracked"):
            with suppress(FileExistsError), artifact.commit_folder(folder, "checkpoint", {}) as made:
                (made / "state").touch()
        (tmp_path / "file").touch()
        if run.storage:
            run.storage.upload(tmp_path / "step-000000005", "step-000000005")

    for ended, kept in ((True, False), (False, True), (True, False)):
        put()
        if ended:
            (tmp_path / stage_runner.RESTARTED_MARKER).unlink(missing_ok=True)
        stage_runner._forget(run)
        assert {(tmp_path / name).exists() for name in ("step-000000005", "file")} == {kept}
        assert (tmp_path / "tracked").exists()  # what MLflow may still have to receive
        assert run.storage is None or run.storage.holds("step-000000005") == kept
        assert (f"goes on; to begin once more, delete {tmp_path}" in capsys.readouterr().err) == kept


@pytest.mark.parametrize("by_dvc", [True, False])
def test_only_under_dvc_does_a_stage_die_with_its_parent(monkeypatch, by_dvc):
    """By hand the parent is a shell, which may end before it, as under nohup."""
    asked = []
    monkeypatch.setattr(stage_runner, "die_with_parent", asked.append)
    monkeypatch.setattr(stage_runner, "_run", lambda *_: None)
    monkeypatch.setattr(stage_runner.signal, "signal", lambda *_: None)
    monkeypatch.setenv("DVC_STAGE", "vqvae") if by_dvc else monkeypatch.delenv("DVC_STAGE", raising=False)
    assert stage_runner.run_stage("vqvae") == 0 and asked == [signal.SIGINT] * by_dvc


def test_who_asks_for_the_owner_keeps_nobody_out(tmp_path):
    """The lock that asking takes for an instant is waited for."""
    with ownership.exclusive_lock(tmp_path):
        pass
    with (tmp_path / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        threading.Timer(0.2, lambda: fcntl.flock(file, fcntl.LOCK_UN)).start()
        with ownership.exclusive_lock(tmp_path):
            assert f"PID {os.getpid()}" in ownership.owner(tmp_path)


def test_a_process_dies_with_its_parent(tmp_path):
    """When the parent is killed, the kernel ends the child."""
    child = "import signal, time; from pipeline.process import die_with_parent\n"
    child += "die_with_parent(signal.SIGTERM); print('ready', flush=True); time.sleep(60)"
    parent = f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    # The pipe ends when the last holder of its writing end is gone.
    assert process.stdout.read() == ""
