"""The wheel, built and installed in an environment of its own over the packages of this one."""

import os
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

from tests.command_line_project import CommandLineProject, CommandResult

FOREIGN = ("models", "pipeline", "stages", "tests")  # packages of a user's with names of ours


@dataclass(frozen=True)
class Installation:
    """Environment with the wheel, and a folder with foreign packages, which is also on PYTHONPATH."""

    programs: Path
    folder: Path

    @classmethod
    def of_wheel(cls, wheel: Path, folder: Path) -> "Installation":
        """Install a wheel. Dependencies come from this environment, whose own vqvae2 the new one hides."""
        venv.create(folder / "environment", symlinks=True)
        programs = folder / "environment" / "bin"
        command = [sys.executable, "-m", "pip", "--python", str(programs / "python"), "install", "--quiet"]
        subprocess.run([*command, "--no-deps", "--no-index", str(wheel)], check=True)
        (site,) = (folder / "environment").glob("lib/python*/site-packages")
        # Python does not read the *.pth files there, so no editable vqvae2 is found.
        (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
        work = folder / "work"
        for name in FOREIGN:
            (work / name).mkdir(parents=True)
            (work / name / "__init__.py").write_text("COLOR = 'green'\n")
            (work / name / "cli.py").write_text("raise SystemExit('foreign code')\n")
        return cls(programs, work)

    def call(self, *command: str, folder: str = "", status: int = 0, **environment: str) -> CommandResult:
        """Run a program of the installation in a folder below the work folder."""
        path = os.pathsep.join((str(self.programs), os.environ["PATH"]))
        variables = {"PATH": path, "PYTHONPATH": str(self.folder), **environment}
        return CommandLineProject(self.folder / folder, variables).call(*command, status=status)


def build_wheel(root: Path, out: Path) -> Path:
    """Build the wheel of the sources in a folder."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)],
        cwd=root,
        check=True,
        capture_output=True,
    )
    (wheel,) = out.glob("*.whl")
    return wheel
