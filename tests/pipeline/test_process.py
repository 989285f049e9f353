"""Tests of the process setup of a command."""

import os
import subprocess
import sys
from pathlib import Path


def test_copy_of_the_project_runs_its_own_code(tmp_path):
    """A queued experiment runs in a copy of the project, with the code of the copy."""
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "__init__.py").touch()
    (tmp_path / "pipeline" / "cli.py").write_text("def main():\n    print('the code of the copy')\n")
    program = Path(sys.executable).with_name("vqvae2")
    done = subprocess.run([program, "status"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "the code of the copy\n", done.stderr


def test_closed_output_is_not_an_error(project):
    """The reader of `vqvae2 config | head -1` closes the pipe early. Here it is closed before anything is printed."""
    reader, writer = os.pipe()
    os.close(reader)
    program = [sys.executable, "-c", "from pipeline.cli import main; main()", "config"]
    done = subprocess.run(program, cwd=project.folder, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
