"""Files of a new project, which `vqvae2 init` and `vqvae2 demo` write.

    dvc.yaml, .dvc/, .dvcignore, .gitignore   as in the repository
    conf/project.yaml                         defaults of the project, laid over those of the package (conf_layers.py)
    conf/dataset/mine.yaml                    its images
    conf/experiment/mine.yaml                 its preset
    params.yaml                               composed from these
    README.md                                 commands

A new project is written to a temporary folder and validated there. Its files are then added to the user's folder, where
no existing file is replaced.
"""

import configparser
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline import conf_layers, params
from pipeline.compose import compose_params, to_yaml
from pipeline.conf_layers import PACKAGE_ROOT, PACKAGED
from pipeline.text import first_few
from stages.errors import UserError

OWN_CHOICE = "mine"  # name of the project's files in the groups dataset and experiment
COPIED = ("dvc.yaml", ".dvc/plots/bars.json", ".dvc/plots/curves.json", ".dvc/plots/page.html")
MERGED = (".gitignore", ".dvcignore", ".dvc/.gitignore")  # if the file exists, the lines that it lacks are added
MUST_BE_NEW = (  # any other file of the user's stays as it is
    "dvc.yaml",
    "params.yaml",
    "conf/config.yaml",  # not written; an existing one would hide that of the package
    f"conf/dataset/{OWN_CHOICE}.yaml",
    f"conf/experiment/{OWN_CHOICE}.yaml",
)
DVC_CONFIG = Path(".dvc/config")
GIT_IDENTITY = "vqvae2"  # author of the first commit, if Git is not configured
COMMIT_HINT = "commit    the new files, which dvc exp run needs: git add, git commit"  # where Git could not

PRIMARY_CONFIG = """\
# Defaults of this project. A file in conf/ replaces the file of the same name in the installed vqvae2.
# `vqvae2 config` shows the settings that result.

defaults:
  - config{defaults}
  - _self_

hydra:
  searchpath:
    - file://${{vqvae2.packaged_conf:}}
"""
OWN_DEFAULTS = f"""
  - override /dataset: {OWN_CHOICE}
  - override /experiment: {OWN_CHOICE}"""
EXPERIMENT_CONFIG = """\
# @package _global_
# Preset of this project: {preset}. Settings below the defaults list override it.
#
# command   vqvae2 run

defaults:
  - {preset}
"""
README = """\
# {name}

This project trains VQ-VAE-2 (Razavi et al. 2019) on a folder of images, draws samples and evaluates them.

| command | purpose |
|---|---|
| `vqvae2 data` | show the images that a run would use: splits, classes, sizes, and interpretations that may be wrong |
| `vqvae2 plan --measure` | estimate the time of a run on this machine |
| `vqvae2 run` | run the stages that are out of date and print the path of the report; resumes an interrupted run |
| `vqvae2 run -S experiment=smoke` | run all stages on these images with the smallest settings |
| `vqvae2 status --watch` | show the progress of a run |
| `vqvae2 sample drawn --count 16` | draw 16 images and write them to the folder `drawn` |
| `vqvae2 config` | show all settings |
| `dvc repro`, `dvc exp run -S seed=1`, `dvc metrics show`, `dvc plots show` | use DVC directly |

{settings}
"""


@contextmanager
def temporary_project(name: str, primary_config: str, settings_text: str) -> Iterator[Path]:
    """Yield a temporary folder with the files that all projects have. `settings_text` is a paragraph of the README."""
    with tempfile.TemporaryDirectory(prefix="vqvae2-new-") as temporary:
        folder = Path(temporary)
        for file in (*COPIED, *MERGED):
            write(folder / file, (PACKAGE_ROOT / file).read_bytes())
        config = (PACKAGE_ROOT / DVC_CONFIG).read_text(encoding="utf-8")
        write(folder / DVC_CONFIG, config.replace("[hydra]\n", f"[hydra]\n    config_name = {conf_layers.PROJECT}\n"))
        write(folder / "conf" / f"{conf_layers.PROJECT}.yaml", primary_config)
        write(folder / "README.md", README.format(name=name, settings=settings_text))
        yield folder


def write_settings(folder: Path, dataset: Mapping[str, Any], preset: str, changes: Mapping[str, Any]) -> None:
    """Write the project's files of the groups dataset and experiment.

    `dataset` are settings that differ from those of the group's file `folder`; `changes` override the preset:
    section -> settings.
    """
    text = (PACKAGED / "dataset" / "folder.yaml").read_text(encoding="utf-8")
    values = {**params.parse(text), **dataset}
    header = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    write(folder / "conf" / "dataset" / f"{OWN_CHOICE}.yaml", header + params.to_yaml(values))
    settings = f"\n{params.to_yaml(changes)}" if changes else ""
    write(folder / "conf" / "experiment" / f"{OWN_CHOICE}.yaml", EXPERIMENT_CONFIG.format(preset=preset) + settings)


def compose(folder: Path) -> dict[str, Any]:
    """Compose, validate and write params.yaml of a project; return its contents."""
    data = compose_params(conf=folder / "conf")
    params.check(data, "the new project")
    write(folder / params.FILE, to_yaml(data))
    return data


def write(path: Path, contents: str | bytes) -> None:
    """Write a file, and create the folders that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(contents.encode() if isinstance(contents, str) else contents)


def require_addable(folder: Path) -> None:
    """Raise UserError if a folder has files or DVC settings that a new project would replace."""
    if (folder / "conf" / f"{conf_layers.PROJECT}.yaml").is_file():
        raise UserError(
            "This folder is already a project of vqvae2.",
            where=folder,
            fix="Change to it, then run: vqvae2 run. Or choose another folder.",
            code=2,
        )
    clashes = [name for name in MUST_BE_NEW if (folder / name).exists()]
    config = _read_dvc_config(folder)
    clashes += [
        f"{key} in {DVC_CONFIG}" for key, value in _dvc_settings().items() if config.get(key, value).lower() != value
    ]
    if clashes:
        raise UserError(
            f"The folder has {first_few(clashes)}, which a new project would replace.",
            where=folder,
            fix="Choose another folder, or remove these.",
            code=2,
        )


def add(source: Path, folder: Path) -> list[str]:
    """Add the files of a project to a folder; return the names of those written. No existing file loses a line."""
    require_addable(folder)
    written = []
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        name = path.relative_to(source).as_posix()
        target = folder / name
        if name in MERGED and target.exists():
            text = target.read_text(encoding="utf-8")
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line not in text.splitlines()]
            target.write_text("\n".join([text.rstrip("\n"), *lines, ""]).lstrip("\n"), encoding="utf-8")
        elif name == str(DVC_CONFIG) and target.exists():
            _complete_dvc_config(folder)
        elif target.exists():
            continue
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        written.append(name)
    return written


def initialize_git(folder: Path, names: Sequence[str]) -> bool:
    """Create a Git repository with a commit of these files, unless the folder is in one. Return whether it was created.

    DVC's experiments need a commit. The commit fails if a hook refuses it or a signing key is missing. If Git is not
    installed, DVC is configured to work without it.
    """
    if shutil.which("git") is None:
        config = folder / DVC_CONFIG
        config.write_text(config.read_text(encoding="utf-8").replace("[core]\n", "[core]\n    no_scm = true\n"))
        return False
    if _git(folder, "rev-parse", "--is-inside-work-tree").returncode == 0:
        return False
    commands = (["init", "--quiet"], ["add", "--", *names], ["commit", "--quiet", "-m", "vqvae2 init"])
    variables = _missing_identity(folder)
    return all(_git(folder, *command, **variables).returncode == 0 for command in commands)


def _missing_identity(folder: Path) -> dict[str, str]:
    """Return environment variables with a name and an e-mail address, as far as Git is not configured with them."""
    missing = [key for key in ("NAME", "EMAIL") if _git(folder, "config", f"user.{key.lower()}").returncode]
    variables = [f"GIT_{role}_{key}" for role in ("AUTHOR", "COMMITTER") for key in missing]
    return {variable: GIT_IDENTITY for variable in variables if variable not in os.environ}


def _git(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["git", *arguments], cwd=folder, env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )


def _dvc_settings() -> dict[str, str]:
    """Return the settings of DVC that `dvc exp run` and `dvc plots show` need; values in lower case."""
    return {
        "hydra.enabled": "true",
        "hydra.config_name": conf_layers.PROJECT,
        "plots.html_template": "plots/page.html",
    }


def _read_dvc_config(folder: Path) -> dict[str, str]:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.read(folder / DVC_CONFIG, encoding="utf-8")
    return {f"{section}.{key}": value for section in parser.sections() for key, value in parser[section].items()}


def _complete_dvc_config(folder: Path) -> None:
    """Add the settings of `_dvc_settings` that an existing DVC repository lacks."""
    from pipeline import dvc

    config = _read_dvc_config(folder)
    for key, value in _dvc_settings().items():
        if key not in config:
            subprocess.run([*dvc.COMMAND, "config", key, value], cwd=folder, check=True, capture_output=True)
