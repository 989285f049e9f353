"""DVC by its command: reasons, outcomes and a good end."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import dvc, dvc_yaml, params
from stages.errors import UserError

ROOT = Path(__file__).parents[2]
DVC_YAML = """
stages:
  first:
    cmd: mkdir -p artifacts/first && cp source artifacts/first/file
    deps: [source]
    params: [settings]
    outs: [artifacts/first]
  second:
    cmd: "{command}"
    deps: [artifacts/first]
    outs: [artifacts/second]
"""
COPY = "mkdir -p artifacts/second && cp artifacts/first/file artifacts/second"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A project of two stages that copy a file."""
    monkeypatch.chdir(tmp_path)
    subprocess.run([*dvc.COMMAND, "init", "--no-scm", "-q"], check=True)
    Path("dvc.yaml").write_text(DVC_YAML.format(command=COPY))
    Path("params.yaml").write_text("settings: {side: 32, name: a}\n")
    Path("source").write_text("content")
    return tmp_path


def bring(targets=(), **options):
    stages = dvc_yaml.stages(params.read())
    return dvc.reproduce(targets, stages=stages, why=dvc.reasons(stages, targets), environment=os.environ, **options)


def reasons(targets=(), **options):
    return dvc.reasons(dvc_yaml.stages(params.read()), targets, **options)


def test_reasons_name_old_and_new_values_and_follow_the_stages(here, capfd):
    """Before, between and after runs, each stage out of date says why."""
    assert reasons() == {"first": ["it has not run yet"], "second": ["it has not run yet"]}
    outcome = bring()
    assert (outcome.status, outcome.ran) == (0, ["first", "second"])
    assert reasons() == {}

    Path("params.yaml").write_text("settings: {side: 64, name: a}\n")
    assert reasons() == {"first": ["settings.side 32 -> 64"], "second": ["first runs before it"]}
    assert reasons(["first"]) == {"first": ["settings.side 32 -> 64"]}
    assert reasons(["second"], only=True) == {}  # on the inputs in place
    assert bring().kept == ["second"]  # the copy is the same

    Path("params.yaml").write_text("settings: {side: 32, name: a}\n")
    assert bring().restored == ["first"]
    Path("source").write_text("other")
    assert reasons()["first"] == ["source was modified"]

    text = capfd.readouterr().out
    assert "first         runs: settings.side 32 -> 64\n" in text and "second        unchanged\n" in text
    assert "first         restored from cache" in text and "git add" not in text


def test_what_is_not_here_may_never_have_been(here):
    """A fresh checkout has the lock and nothing else: no word of deleting, and none of what the stages before make."""
    bring()
    shutil.rmtree("artifacts")
    assert reasons() == {
        "first": ["artifacts/first is not here"],
        "second": ["artifacts/second is not here", "first runs before it"],
    }
    shutil.rmtree(".dvc/cache")
    assert reasons()["first"] == ["artifacts/first is not in the cache"]


def test_reasons_list_stages_as_people_do(monkeypatch):
    """With commas, and one `and`."""
    stages = dvc_yaml.stages(params.read(ROOT / "params.yaml"), ROOT / "dvc.yaml")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(dvc, "_status", lambda: {"codes": ["changed command"]})
    why = dvc.reasons(stages)
    assert why["codes"] == ["its command changed"] and why["prior@top"] == ["codes runs before it"]
    assert why["evaluate"] == ["codes, prior_top, prior_bottom and sample run before it"]


def test_force_and_only(here):
    """--force runs what is up to date; --only leaves the rest alone."""
    bring()
    assert bring(force=True).ran == ["first", "second"]
    assert bring(["second"], force=True, only=True).ran == ["second"]


def test_a_failing_stage_fails_the_run(here, capfd):
    """DVC's status comes back."""
    Path("dvc.yaml").write_text(DVC_YAML.format(command="exit 4"))
    outcome = bring()
    assert outcome.status != 0 and outcome.ran == ["first", "second"]


def test_what_the_cache_lacks_is_named(here):
    """DVC ends with status 0 where it could not put there what a stage has made."""
    assert dvc.uncached(bring().ran) == []
    shutil.rmtree(".dvc/cache")
    assert dvc.uncached(["second"]) == ["second"] and dvc.uncached([]) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_stage_in_good_order(here, number):
    """Asked to stop, the run passes SIGINT to the stage, waits for it, and leaves nothing running."""
    stage = "trap 'echo ended > trace; exit 130' INT; echo $$ > pid; sleep 60 & wait"
    Path("dvc.yaml").write_text(DVC_YAML.format(command=stage))
    code = "import os; from pipeline import dag, dvc, params\n"
    code += "o = dvc.reproduce([], stages=dag.stages(params.read()), why={}, environment=os.environ); print(o.stopped)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 60
    while not Path("pid").exists() or not Path("pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(number)
    assert process.communicate(timeout=60)[0].splitlines()[-1] == str(int(number))
    assert Path("trace").read_text() == "ended\n"


def test_needed_is_the_way_up(here):
    """A target needs what it reads, and what that reads."""
    stages = dvc_yaml.stages(params.read(ROOT / "params.yaml"), ROOT / "dvc.yaml")
    assert dvc.needed(stages, ["prior@top"]) == {"prior@top", "codes", "vqvae", "shard"}
    assert dvc.needed(stages, ["evaluate"]) == set(stages)


@pytest.mark.parametrize(
    ("said", "what", "fix"),
    [
        (
            "ERROR: Unable to acquire lock: (PID 7) (PID 7) (PID 8)\n",
            f"{dvc.BUSY}: PID 7, 8.",
            "Wait for it or stop it",
        ),
        (
            "ERROR: you are not inside of a DVC repository\n",
            "DVC cannot tell what is out of date: you are",
            "Run: dvc init",
        ),
        ("ERROR: /a is not a git repository\n", "DVC cannot tell what is out of date: /a is", "Run: git init"),
        ("ERROR: 'x' is odd\n  quoted: 1\n", "DVC cannot tell what is out of date: 'x' is odd", "Mend what it names."),
        ("", "DVC cannot tell what is out of date: it says nothing", "Mend what it names."),
    ],
)
def test_what_dvc_cannot_do_is_told_in_its_words(monkeypatch, said, what, fix):
    """With the fix where it is known."""
    done = subprocess.CompletedProcess([], 255, stdout="", stderr=said)
    monkeypatch.setattr(dvc.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(UserError) as caught:
        dvc.reasons({})
    assert caught.value.what.startswith(what) and caught.value.where == str(Path.cwd()) and fix in caught.value.fix
