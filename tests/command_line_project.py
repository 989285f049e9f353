"""Copies of this project to run `vqvae2` in, as a user does. Used by tests and by benchmarks."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline.process import DEFAULTS
from stages.formats import artifact
from stages.tracking.journal import JOURNAL_FILE
from tests.fork_server import run_command

ROOT = Path(__file__).parents[1]
SMOKE = ("-S", "experiment=smoke")
PRIVATE_PREFIXES = ("RAY_", "MLFLOW_", "VQVAE2_", "DVC_", "AWS_")  # of variables that a command must not inherit
STAGE_STATE = re.compile(r"^(\w+) +(runs|unchanged|restored from cache)(?:$|: (.*))", re.MULTILINE)  # printed by run


@dataclass(frozen=True)
class CommandResult:
    """Exit status and output of a command."""

    status: int
    output: str

    def stages(self, state: str) -> set[str]:
        """Return the stages in a state: "runs", "unchanged" or "restored from cache"."""
        return {stage for stage, stage_state, _ in STAGE_STATE.findall(self.output) if stage_state == state}


@dataclass(frozen=True)
class CommandLineProject:
    """Copy of this project, and the environment of its commands."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of_working_tree(cls, folder: Path) -> "CommandLineProject":
        """Copy every file of the working tree that Git does not ignore, and commit them to a new repository."""
        names = subprocess.check_output(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True
        )
        for name in filter(None, names.split("\0")):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        project = cls(folder)
        project.call("git", "init", "--quiet")
        project.commit()
        return project

    @classmethod
    def of_settings(cls, folder: Path, dvc_folder: Path) -> "CommandLineProject":
        """Copy only the settings and link the code, without Git: faster. `dvc_folder` is a .dvc of `dvc init`."""
        for name in ("stages", "models", "data"):
            (folder / name).symlink_to(ROOT / name)
        for name in ("dvc.yaml", "params.yaml", ".dvcignore"):
            shutil.copyfile(ROOT / name, folder / name)
        shutil.copytree(ROOT / "conf", folder / "conf")
        shutil.copytree(dvc_folder, folder / ".dvc")
        return cls(folder)

    def copy(self, folder: Path, **environment: str) -> "CommandLineProject":
        """Copy everything, also artifacts, cache and work folders."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return CommandLineProject(folder, {**self.environment, **environment})

    def clone(self, folder: Path, **environment: str) -> "CommandLineProject":
        """Clone the repository, without artifacts and cache."""
        subprocess.run(["git", "clone", "--quiet", str(self.folder), str(folder)], check=True)
        return CommandLineProject(folder, {**self.environment, **environment})

    def commit(self) -> None:
        """Commit every file to Git."""
        self.call("git", "add", "--all")
        self.call("git", "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "--quiet", "-m", "State")

    def edit(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Change the contents of params.yaml; this removes its header."""
        yaml, path = YAML(typ="safe", pure=True), self.folder / "params.yaml"
        yaml.sort_base_mapping_type_on_output = False  # levels have an order
        data = yaml.load(path)
        change(data)
        with path.open("w", encoding="utf-8") as file:
            yaml.dump(data, file)

    def command(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run `vqvae2` in the environment of the tests, with stdout and stderr apart and any exit status."""
        return run_command(
            arguments, self.folder, {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", **environment}, timeout_s=300
        )

    def call(self, *command: str, status: int = 0, timeout: float = 550) -> CommandResult:
        """Run a command in `variables()`. Fail with its output if it ends with another status or takes too long."""
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.variables(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()
            output, _ = process.communicate()
            raise AssertionError(f"{' '.join(command)} took more than {timeout:g} s:\n{output}") from None
        assert process.returncode == status, f"{' '.join(command)} ended with {process.returncode}:\n{output}"
        return CommandResult(process.returncode, output)

    def run(self, *arguments: str, status: int = 0) -> CommandResult:
        """Run `vqvae2 run` with these arguments."""
        return self.call("vqvae2", "run", *arguments, status=status)

    def variables(self) -> dict[str, str]:
        """Return the environment of commands: this interpreter's programs first, no private variables."""
        return public_environment() | {
            "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
            "COLUMNS": "120",
            "DVC_NO_ANALYTICS": "1",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive",
            "PYTHONFAULTHANDLER": "1",
            "SHELL": "/bin/sh",  # DVC runs stages in it; containers have no SHELL, so the default would differ
            **self.environment,
        }

    def digests(self, *names: str) -> dict[str, str]:
        """Return the digests of artifacts by their names under artifacts/, by default of all."""
        root = self.folder / "artifacts"
        folders = [root / name for name in names] or [path.parent for path in sorted(root.rglob(artifact.MANIFEST))]
        return {str(folder.relative_to(root)): artifact.sha256(folder / artifact.MANIFEST) for folder in folders}

    def newest_step(self, stage: str) -> int:
        """Return the step of a stage's newest checkpoint; 0 if there is none."""
        checkpoints = (self.folder / "runs" / stage).glob("*/step-*[0-9]")
        return max((int(path.name.removeprefix("step-")) for path in checkpoints), default=0)

    def reported_step(self, stage: str) -> int:
        """Return the last step with training metrics of a stage; 0 if there is none."""
        last_step = 0
        for path in (self.folder / "runs" / stage).rglob(JOURNAL_FILE):
            for line in path.read_text(encoding="utf-8").splitlines():
                record = json.loads(line)
                if record["kind"] == "metrics" and any(name.startswith("train/") for name in record["values"]):
                    last_step = max(last_step, record["step"])
        return last_step


def public_environment() -> dict[str, str]:
    """Return the environment of this process without the variables that a command must not inherit or sets itself."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(PRIVATE_PREFIXES) and name not in DEFAULTS
    }
