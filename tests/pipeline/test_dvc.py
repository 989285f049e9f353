"""Tests of running DVC: reasons, outcomes and graceful stops."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import chdir
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
def small_project(tmp_path):
    """A project of two stages that copy a file, as the current folder."""
    with chdir(tmp_path):
        subprocess.run([*dvc.COMMAND, "init", "--no-scm", "-q"], check=True)
        Path("dvc.yaml").write_text(DVC_YAML.format(command=COPY))
        Path("params.yaml").write_text("settings: {side: 32, name: a}\n")
        Path("source").write_text("content")
        yield tmp_path


def repro(targets=(), **options):
    stages = dvc_yaml.stages(params.read())
    reasons = dvc.out_of_date_reasons(stages, {}, targets)
    return dvc.run_repro(targets, reasons=reasons, environment=os.environ, **options)


def reasons(targets=(), **options):
    return dvc.out_of_date_reasons(dvc_yaml.stages(params.read()), {}, targets, **options)


def test_reasons_have_old_and_new_values_and_follow_dependencies(small_project, capfd):
    """Each stage that is out of date has its reasons before, between and after runs."""
    assert reasons() == {"first": ["it has not run yet"], "second": ["it has not run yet"]}
    outcome = repro()
    assert (outcome.status, outcome.ran) == (0, ["first", "second"])
    assert reasons() == {}

    Path("params.yaml").write_text("settings: {side: 64, name: a}\n")
    assert reasons() == {"first": ["settings.side 32 -> 64"], "second": ["first runs before it"]}
    assert reasons(["first"]) == {"first": ["settings.side 32 -> 64"]}
    assert reasons(["second"], only=True) == {}  # its inputs are not run
    assert repro().unchanged == ["second"]  # `first` wrote the same bytes

    Path("params.yaml").write_text("settings: {side: 32, name: a}\n")
    assert repro().restored == ["first"]
    Path("source").write_text("other")
    assert reasons()["first"] == ["source was modified"]

    text = capfd.readouterr().out
    assert "first         runs: settings.side 32 -> 64\n" in text and "second        unchanged\n" in text
    assert "first         restored from cache" in text and "git add" not in text


def test_largest_changes_come_first(small_project):
    """Text and added settings before numbers, numbers by their ratio; a line names three and counts the others."""
    lines = {"side": "32", "name": "a", "steps": "100", "rate": "0.1", "depth": "3"}

    def write():
        Path("params.yaml").write_text(
            f"settings: {{{', '.join(f'{key}: {value}' for key, value in lines.items())}}}\n"
        )

    write()
    repro()
    lines |= {"side": "33", "name": "b", "steps": "100000", "rate": "0.2"}
    write()
    (texts,) = reasons(["first"]).values()
    assert [text.split()[0].removeprefix("settings.") for text in texts] == ["name", "steps", "rate", "side"]
    assert dvc.summarize(texts).endswith("settings.rate 0.1 -> 0.2 and 1 more")


def test_missing_outputs_are_not_called_deleted(small_project):
    """A fresh checkout has dvc.lock and no artifacts. Inputs that earlier stages write are not listed."""
    repro()
    shutil.rmtree("artifacts")
    assert reasons() == {
        "first": ["artifacts/first does not exist"],
        "second": ["artifacts/second does not exist", "first runs before it"],
    }
    shutil.rmtree(".dvc/cache")
    assert reasons()["first"] == ["artifacts/first is not in the cache"]


def test_reasons_list_earlier_stages_with_commas_and_one_and(monkeypatch):
    """Several earlier stages are listed as in a sentence."""
    stages = dvc_yaml.stages(params.read(ROOT / "params.yaml"), ROOT / "dvc.yaml")
    monkeypatch.setattr(dvc, "_status", lambda: {"codes": ["changed command"]})
    with chdir(ROOT):
        reasons = dvc.out_of_date_reasons(stages, {})
    assert reasons["codes"] == ["its command changed"] and reasons["prior@top"] == ["codes runs before it"]
    assert reasons["evaluate"] == ["codes, prior_top, prior_bottom and sample run before it"]


def test_force_runs_stages_that_are_up_to_date(small_project):
    """`force` runs all stages; with `only`, the target alone."""
    repro()
    assert repro(force=True).ran == ["first", "second"]
    assert repro(["second"], force=True, only=True).ran == ["second"]


def test_failed_stage_gives_nonzero_status(small_project, capfd):
    """The outcome has DVC's exit status, and the failed stage among those that ran."""
    Path("dvc.yaml").write_text(DVC_YAML.format(command="exit 4"))
    outcome = repro()
    assert outcome.status != 0 and outcome.ran == ["first", "second"]


def test_results_missing_from_the_cache_are_found(small_project):
    """DVC ends with status 0 if its cache has no space for a result."""
    assert dvc.missing_from_cache(repro().ran) == []
    shutil.rmtree(".dvc/cache")
    assert dvc.missing_from_cache(["second"]) == ["second"] and dvc.missing_from_cache([]) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_the_stage_gracefully(small_project, number):
    """The run forwards SIGINT to the stage, waits for it, and leaves no process behind."""
    stage = "trap 'echo ended > trace; exit 130' INT; echo $$ > pid; sleep 60 & wait"
    Path("dvc.yaml").write_text(DVC_YAML.format(command=stage))
    code = "import os; from pipeline import dvc\n"
    code += "print(dvc.run_repro([], reasons={}, environment=os.environ).stop_signal)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 60
    while not Path("pid").exists() or not Path("pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(number)
    assert process.communicate(timeout=60)[0].splitlines()[-1] == str(int(number))
    assert Path("trace").read_text() == "ended\n"


def test_dependencies_are_followed_to_the_first_stage():
    """A target's dependencies include those of its dependencies."""
    stages = dvc_yaml.stages(params.read(ROOT / "params.yaml"), ROOT / "dvc.yaml")
    assert dvc.with_dependencies(stages, ["prior@top"]) == {"prior@top", "codes", "vqvae", "shard"}
    assert dvc.with_dependencies(stages, ["evaluate"]) == set(stages)


@pytest.mark.parametrize(
    ("message", "what", "fix"),
    [
        ("ERROR: Unable to acquire lock: (PID 7) (PID 7) (PID 8)\n", f"{dvc.BUSY}: PID 7, 8.", "Wait until it ends"),
        (
            "ERROR: you are not inside of a DVC repository\n",
            "DVC cannot compute its status: you are",
            "Run: dvc init",
        ),
        ("ERROR: /a is not a git repository\n", "DVC cannot compute its status: /a is", "Run: git init"),
        (
            "ERROR: 'x' is odd\n  quoted: 1\n",
            "DVC cannot compute its status: 'x' is odd",
            "Fix what the message names.",
        ),
        ("", "DVC cannot compute its status: it printed no message", "Fix what the message names."),
    ],
)
def test_failure_of_dvc_is_reported_with_its_message(message, what, fix):
    """The error has DVC's last message, and a fix if one is known."""
    with pytest.raises(UserError) as caught:
        dvc.parse_status(subprocess.CompletedProcess([], 255, stdout="", stderr=message))
    assert caught.value.what.startswith(what) and caught.value.where == str(Path.cwd()) and fix in caught.value.fix
