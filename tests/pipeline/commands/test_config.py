"""Tests of `vqvae2 config`."""

import json
import subprocess
import sys


def test_write_puts_the_printed_settings_into_params_yaml(project):
    """An added level gets its stage."""
    overrides = ["vqvae=three_level", "+prior@priors.middle=pixelcnn", "seed=3"]
    printed = project.command("config", *overrides).stdout
    assert project.command("config", *overrides, "--write").stdout == ""
    assert (project.folder / "params.yaml").read_text() == printed
    rows = json.loads(project.command("status", "--json").stdout)["stages"]
    assert [row["stage"] for row in rows if row["stage"].startswith("prior")] == [
        "prior_top", "prior_bottom", "prior_middle",
    ]  # fmt: skip


def test_settings_of_a_running_command_are_not_replaced(project):
    """`config --write` is refused while another command holds the project's lock."""
    before = (project.folder / "params.yaml").read_bytes()
    code = "from pathlib import Path\nfrom pipeline.locks import exclusive_project\n"
    code += "with exclusive_project(Path('runs')): print('locked', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=project.folder
    ) as process:
        process.stdout.readline()
        done = project.command("config", "seed=3", "--write")
        process.communicate("\n")
    assert done.returncode == 3 and "uses this project: PID" in done.stderr
    assert (project.folder / "params.yaml").read_bytes() == before
