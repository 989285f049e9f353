"""Tests of the process setup of a command."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import process

ROOT = Path(__file__).parents[2]


def run_console_script(folder, *arguments, **environment):
    """Run the installed program in a folder. Python itself must not add the folder to its path."""
    program = Path(sys.executable).with_name("vqvae2")
    inherited = {name: value for name, value in os.environ.items() if name != "VQVAE2_CODE"}
    return subprocess.run(
        [program, *arguments], cwd=folder, env=inherited | environment, capture_output=True, text=True
    )


def write_code(folder, text, pyproject):
    """Write a package `pipeline` that prints a text when it is imported or run."""
    (folder / "pipeline").mkdir()
    (folder / "pipeline" / "__init__.py").touch()
    (folder / "pipeline" / "cli.py").write_text(f"print({text!r})\ndef main():\n    pass\n")
    (folder / "pyproject.toml").write_text(pyproject)


def test_copy_of_the_project_runs_its_own_code(tmp_path):
    """A queued experiment runs in a copy of the project, with the code of the copy."""
    write_code(tmp_path, "the code of the copy", '[project]\nname = "vqvae2"\n')
    done = run_console_script(tmp_path, "status")
    assert done.stdout == "the code of the copy\n", done.stderr


def test_copy_whose_code_cannot_be_imported_is_refused(tmp_path):
    """PYTHONPATH separates folders by colons. Running other code than that of the copy would record wrong results."""
    copy = tmp_path / "a:b"
    copy.mkdir()
    write_code(copy, "the code of the copy", '[project]\nname = "vqvae2"\n')
    done = run_console_script(copy, "status")
    assert done.returncode == 2 and done.stderr.startswith("error: The code of this copy of the project cannot be run")
    assert done.stdout == "" and "its path contains ':'" in done.stderr and "Rename the folder" in done.stderr


def test_copy_in_a_copy_runs_its_own_code(tmp_path):
    """A command that runs another copy's code has restarted itself there, and its child restarts itself again."""
    write_code(tmp_path, "the code of the copy", '[project]\nname = "vqvae2"\n')
    done = run_console_script(tmp_path, "status", VQVAE2_CODE="/elsewhere")
    assert done.stdout == "the code of the copy\n", done.stderr


@pytest.mark.parametrize(
    "pyproject",
    ['[project]\nname = "other"\n', "[tool.ruff]\n", "project = 3\n", "not TOML", '[project]\nname = ["vqvae2"]\n'],
)
def test_code_of_another_project_is_not_executed(tmp_path, pyproject):
    """Another project may have a module of the same name. The installed code runs there, and no module of it."""
    write_code(tmp_path, "foreign code", pyproject)
    for name in ("dvc", "stages", "yaml", "tomllib"):
        (tmp_path / f"{name}.py").write_text("print('foreign code')\n")
    assert not process.is_copy_of_project(tmp_path)
    done = run_console_script(tmp_path, "--version")
    assert done.returncode == 0 and done.stdout.startswith("vqvae2 ") and "foreign" not in done.stdout + done.stderr
    done = run_console_script(tmp_path, "status")
    assert done.returncode == 2 and "dvc.yaml does not exist" in done.stderr and "foreign" not in done.stdout


def test_programs_started_by_a_command_import_nothing_from_the_current_folder(project):
    """A file of the user's that is named as a package of DVC's is not imported by DVC."""
    (project.folder / "dvc.py").write_text("print('foreign code')\n")
    done = run_console_script(project.folder, "status", PYTHONPATH=str(ROOT))
    assert done.returncode == 0 and "foreign" not in done.stdout + done.stderr, done.stderr


def test_commands_set_defaults_and_keep_values_of_the_user():
    """The variables are for libraries and child processes."""
    code = "import json, os; from pipeline import process; process.prepare(); print(json.dumps(dict(os.environ)))"
    name = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
    environment = {"PATH": os.environ["PATH"], name: "7"}
    printed = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=environment, text=True)
    assert json.loads(printed).items() >= (process.DEFAULTS | {name: "7"}).items()


def test_closed_output_is_not_an_error(project):
    """The reader of `vqvae2 config | head -1` closes the pipe early. Here it is closed before anything is printed."""
    reader, writer = os.pipe()
    os.close(reader)
    program = [sys.executable, "-c", "from pipeline.cli import main; main()", "config"]
    done = subprocess.run(program, cwd=project.folder, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_advice_after_a_signal_is_true_in_a_temporary_copy(tmp_path, monkeypatch, capsys):
    """DVC deletes the copy of an interrupted experiment with its checkpoints, so only a storage resumes it."""
    copy = tmp_path / ".dvc" / "tmp" / "exps" / "copy"
    copy.mkdir(parents=True)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    for folder, advice in (
        (tmp_path, "Run the same command again to resume."),
        (copy, "only if cluster.storage is set."),
    ):
        monkeypatch.chdir(folder)
        assert process.stopped(signal.SIGINT) == 130
        text = capsys.readouterr().err
        assert text.startswith("Stopped by SIGINT. ") and text.endswith(f"{advice}\n")
