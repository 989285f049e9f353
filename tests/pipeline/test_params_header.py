"""params.yaml says what it was composed with, and nobody loses a setting without being told."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import params, params_header
from pipeline.commands import run

OLD = ("train_vqvae.steps=500", "experiment=smoke")


@pytest.fixture
def here(project, monkeypatch):
    monkeypatch.chdir(project.folder)
    return project


def edit_conf(old: str, new: str) -> None:
    """Change conf/config.yaml later than params.yaml, on a file system of any clock."""
    path = Path("conf/config.yaml")
    path.write_text(path.read_text().replace(old, new))
    later = params.FILE.stat().st_mtime + 2
    os.utime(path, (later, later))


def test_the_header_keeps_the_overrides(here):
    """Whatever their signs and quotes, they read back as they were given."""
    given = ["vqvae=three_level", "+prior@priors.middle=pixelcnn", "dataset.source='photos (1) # 2'"]
    run.config(given, write=True)
    assert params_header.kept() == given
    run.config([], write=True)
    assert params_header.kept() == [] and params.FILE.read_text().splitlines()[1] == "seed: 0"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["seed=3"], "back to conf/: train_vqvae.steps 500 -> {demo}, experiment=smoke\n"),
        (["experiment=smoke", "cluster=local"], "back to conf/: train_vqvae.steps 500 -> {smoke}\n"),
        (["train_vqvae.steps=600", "experiment=smoke"], ""),
        ([*OLD, "seed=3"], ""),
        (list(OLD), ""),
    ],
    ids=["both", "one", "changed", "more", "same"],
)
def test_what_an_earlier_override_said_does_not_go_unsaid(here, capsys, overrides, says):
    """Overrides that are not given again are named, a single setting with both values; no others are."""
    demo, smoke = (run.compose(choice)[1].train_vqvae.steps for choice in ([], ["experiment=smoke"]))
    run.config(OLD, write=True)
    assert capsys.readouterr().err == ""
    run.config(overrides, write=True)
    assert capsys.readouterr().err == (says and f"note: {says.format(demo=demo, smoke=smoke)}")


def test_what_was_edited_in_the_file_does_not_go_unsaid(here, capsys):
    """Nor does what `dvc exp run -S` has put there, which leaves the header out."""
    steps = params.load().train_vqvae.steps
    here.edit(lambda data: data["train_vqvae"].update(steps=700))
    here.edit(lambda data: data.update(seed=5))
    run.config(["seed=6"], write=True)
    assert capsys.readouterr().err == f"note: back to conf/: train_vqvae.steps 700 -> {steps}\n"


def test_a_dry_run_and_a_run_say_it_too(here):
    """-S means the same in each command."""
    run.config(["seed=3"], write=True)
    done = here.command("run", "--dry-run", "-S", "cluster=single")
    assert done.stderr == "note: back to conf/: seed 3 -> 0\n" and done.returncode == 0
    assert params_header.kept() == ["seed=3"]


def test_a_run_at_work_keeps_its_settings(here):
    """`config --write` waits its turn as every run does."""
    before = params.FILE.read_bytes()
    code = "from pipeline.commands.run import _alone\nwith _alone(): print('here', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=here.folder
    ) as process:
        process.stdout.readline()
        done = here.command("config", "seed=3", "--write")
        process.communicate("\n")
    assert done.returncode == 3 and "at work here" in done.stderr and params.FILE.read_bytes() == before


def test_a_change_in_conf_is_noticed(here, capsys):
    """By run, status and doctor, in one line each, with the command that takes it over and keeps the overrides."""
    run.config(["cluster=single"], write=True)
    assert params_header.drift() == ("", "")
    edit_conf("seed: 0", "seed: 0  # a comment changes nothing")
    assert params_header.drift() == ("", "")
    edit_conf("seed: 0", "seed: 4")
    line = "params.yaml is not what conf/ composes to by now: seed 0 -> 4"
    remedy = "vqvae2 config cluster=single --write"
    note = f"note: {line}. Take it over: {remedy}\n"
    assert here.command("status", "--json").stderr == here.command("run", "--dry-run").stderr == note
    doctor = here.command("doctor").stdout
    assert f"warning  settings       {line}\n" in doctor and f"fix: Take it over: {remedy}\n" in doctor
    assert here.command(*remedy.split()[1:]).returncode == 0
    assert params_header.drift() == ("", "") and params.load().seed == 4


def test_a_dry_run_hides_no_change_in_conf(here):
    """It puts params.yaml back as it was, its time included."""
    edit_conf("seed: 0", "seed: 4")
    here.command("run", "--dry-run", "-S", "cluster=single")
    assert "seed 0 -> 4" in params_header.drift()[0]


def test_a_conf_that_does_not_compose_stops_nobody(here):
    """params.yaml is valid by itself: the note says what is wrong with conf/."""
    edit_conf("seed: 0", "seed: [")
    what, remedy = params_header.drift()
    assert "cannot be composed now: The file is not valid YAML" in what and remedy == "Mend that line."


def test_what_editors_leave_in_conf_stops_nobody(here):
    """Emacs marks a file being edited by a link to nowhere."""
    Path("conf/.#config.yaml").symlink_to("somebody@somewhere.1234:1")
    assert params_header.drift() == ("", "")
