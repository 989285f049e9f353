"""Every command explains itself, at once, and stands in the README."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli import app

ROOT = Path(__file__).parents[2]
COMMANDS = {str(command.name or command.callback.__name__): command.callback for command in app.registered_commands}
VQVAE2 = [sys.executable, "-c", "from pipeline.cli import main; main()"]
TYPER = [sys.executable, "-m", "typer", "pipeline"]
HEAVY = ("torch", "mlflow", "ray", "hydra", "dvc", "webdataset", "pandas", "pyarrow", "numpy", "PIL")
HELP = """
import sys
sys.argv = ["vqvae2", *{arguments!r}]
from pipeline.cli import main
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
print("loaded:", *(name for name in {heavy!r} if name in sys.modules))
"""


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name):
    """A command's help is a sentence and at least one command to paste."""
    text = COMMANDS[name].__doc__
    assert text and text.splitlines()[0].endswith((".", "why.")) and f"Example:  vqvae2 {name}" in text
    assert CliRunner().invoke(app, [name, "--help"]).exit_code == 0


@pytest.mark.parametrize("name", ["run", *COMMANDS])
def test_every_command_stands_in_the_readme(name):
    """The README shows each command."""
    assert f"vqvae2 {name}" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["plan", "--help"]], ids=" ".join)
def test_help_imports_nothing_heavy(arguments):
    """Help answers without loading any library that takes time to load."""
    code = HELP.format(arguments=arguments, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded:"


def test_the_version_is_the_packages():
    """`vqvae2 --version` says which one is installed."""
    done = subprocess.run([*VQVAE2, "--version"], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout == f"vqvae2 {importlib.metadata.version('vqvae2')}\n" and done.returncode == 0


def test_commands_stand_beside_run_and_not_below_it():
    """`vqvae2 run --help` lists options alone; under Typer's program, where `run` is everything, the commands too."""
    ours, typers = (
        subprocess.run([*command, "run", "--help"], capture_output=True, text=True, cwd=ROOT, timeout=60).stdout
        for command in (VQVAE2, TYPER)
    )
    assert "Usage: vqvae2 run [OPTIONS]\n" in ours and "Commands:" not in ours and "--dry-run" in ours
    assert all(f"\n  {name} " in typers for name in COMMANDS) and "--dry-run" in typers


@pytest.mark.parametrize(
    "arguments",
    [["run", "--stage", "nowhere"], ["run", "config", "seed=1"], ["run", "--help"]],
    ids=" ".join,
)
def test_typers_own_program_runs_the_pipeline(arguments):
    """`typer pipeline run ...` is the same program."""
    done = subprocess.run([*TYPER, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=60)
    expected = 2 if "nowhere" in arguments else 0
    assert done.returncode == expected, done.stderr
    assert "Traceback" not in done.stderr
