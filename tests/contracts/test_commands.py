"""Every command has help, answers --help fast and is listed in the README."""

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
SLOW_LIBRARIES = ("torch", "mlflow", "ray", "hydra", "dvc", "webdataset", "pandas", "pyarrow", "numpy", "PIL")
HELP = """
import sys
sys.argv = ["vqvae2", *{arguments!r}]
from pipeline.cli import main
try:
    main()
except SystemExit as exit:
    assert not exit.code, exit.code
print("loaded:", *(name for name in {libraries!r} if name in sys.modules))
"""


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name):
    """The help of a command is a sentence and at least one command to paste."""
    text = COMMANDS[name].__doc__
    assert text and text.splitlines()[0].endswith((".", "why.")) and f"Example:  vqvae2 {name}" in text
    assert CliRunner().invoke(app, [name, "--help"]).exit_code == 0


@pytest.mark.parametrize("name", ["run", *COMMANDS])
def test_every_command_is_in_the_readme(name):
    """The README lists each command."""
    assert f"vqvae2 {name}" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["plan", "--help"]], ids=" ".join)
def test_help_imports_no_slow_library(arguments):
    """Help is printed without importing a library that takes long to import."""
    code = HELP.format(arguments=arguments, libraries=SLOW_LIBRARIES)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "loaded:"


def test_version_is_that_of_the_package():
    """`vqvae2 --version` prints the installed version."""
    result = subprocess.run([*VQVAE2, "--version"], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert result.stdout == f"vqvae2 {importlib.metadata.version('vqvae2')}\n" and result.returncode == 0


def test_help_lists_commands_in_groups():
    """Every command is in a section, the one that a newcomer needs first."""
    text = subprocess.run([*VQVAE2, "--help"], capture_output=True, text=True, cwd=ROOT, timeout=60).stdout
    sections = [line.rstrip(":") for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert sections == ["Options", "Run", "Inspect", "Use models", "Project"]
    assert all(f"\n  {name} " in text for name in ["run", *COMMANDS])
    assert text.index("\n  run ") < min(text.index(f"\n  {name} ") for name in COMMANDS)


def test_run_help_lists_commands_only_under_typer():
    """`vqvae2 run --help` lists options only. `typer pipeline run --help` also lists the commands."""
    vqvae2_help, typer_help = (
        subprocess.run([*command, "run", "--help"], capture_output=True, text=True, cwd=ROOT, timeout=60).stdout
        for command in (VQVAE2, TYPER)
    )
    assert (
        "Usage: vqvae2 run [OPTIONS]\n" in vqvae2_help and "Commands:" not in vqvae2_help and "--dry-run" in vqvae2_help
    )
    assert all(f"\n  {name} " in typer_help for name in COMMANDS) and "--dry-run" in typer_help


@pytest.mark.parametrize(
    "arguments",
    [["run", "--stage", "nowhere"], ["run", "config", "seed=1"], ["run", "--help"]],
    ids=" ".join,
)
def test_typer_program_runs_the_pipeline(arguments):
    """`typer pipeline run ...` accepts the same arguments as `vqvae2`."""
    result = subprocess.run([*TYPER, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=60)
    expected = 2 if "nowhere" in arguments else 0
    assert result.returncode == expected, result.stderr
    assert "Traceback" not in result.stderr
