"""Files of a new project, which `vqvae2 init` and `vqvae2 demo` write.

    dvc.yaml, .dvc/, .dvcignore, .gitignore   as in the repository
    conf/project.yaml                         defaults of the project, laid over those of the package (conf_layers.py)
    conf/dataset/mine.yaml                    its images
    conf/experiment/mine.yaml                 its preset
    params.yaml                               composed from these
    README.md                                 commands

A new project is written to a temporary folder and validated there, then added to its folder without replacing a file.
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

OWN = "mine"  # file of the project in the groups dataset and experiment
COPIED = ("dvc.yaml", ".dvc/plots/bars.json", ".dvc/plots/curves.json", ".dvc/plots/page.html")
MERGED = (".gitignore", ".dvcignore", ".dvc/.gitignore")  # lines that an existing file lacks are added to it
ADDED = (  # files that must not exist yet; others that exist stay as they are
    "dvc.yaml",
    "params.yaml",
    "conf/config.yaml",  # it would hide that of the package
    f"conf/dataset/{OWN}.yaml",
    f"conf/experiment/{OWN}.yaml",
)
DVC_CONFIG = Path(".dvc/config")
GIT_IDENTITY = "vqvae2"  # of the first commit, if Git knows none

PRIMARY = """\
# Defaults of this project. All files of conf/ hide those of the installed vqvae2; `vqvae2 config` shows the result.

defaults:
  - config{choices}
  - _self_

hydra:
  searchpath:
    - file://${{vqvae2.packaged_conf:}}
"""
CHOICES = f"""
  - override /dataset: {OWN}
  - override /experiment: {OWN}"""
EXPERIMENT = """\
# @package _global_
# The preset {preset}, changed by the settings below.
#
# command   vqvae2 run

defaults:
  - {preset}
"""
README = """\
# {name}

A project of vqvae2: VQ-VAE-2 (Razavi et al. 2019), from a folder of images to samples and a report.

| command | does |
|---|---|
| `vqvae2 data` | show the images of a run: splits, classes, sizes, doubts |
| `vqvae2 plan --measure` | estimate the time of a run |
| `vqvae2 run` | run the stages that are out of date, also after an interruption; ends with the path of the report |
| `vqvae2 run -S experiment=smoke` | the smallest run of all stages, on these images |
| `vqvae2 status --watch` | show what runs |
| `vqvae2 sample drawn --count 16` | draw images |
| `vqvae2 config` | show all settings |
| `dvc repro`, `dvc exp run -S seed=1`, `dvc metrics show`, `dvc plots show` | work as usual |

{settings}
"""


@contextmanager
def staged(name: str, primary: str, settings: str) -> Iterator[Path]:
    """Yield a temporary folder with the files that every project has; `settings` is the paragraph of the README."""
    with tempfile.TemporaryDirectory(prefix="vqvae2-new-") as temporary:
        folder = Path(temporary)
        for file in (*COPIED, *MERGED):
            write(folder / file, (PACKAGE_ROOT / file).read_bytes())
        config = (PACKAGE_ROOT / DVC_CONFIG).read_text(encoding="utf-8")
        write(folder / DVC_CONFIG, config.replace("[hydra]\n", f"[hydra]\n    config_name = {conf_layers.PROJECT}\n"))
        write(folder / "conf" / f"{conf_layers.PROJECT}.yaml", primary)
        write(folder / "README.md", README.format(name=name, settings=settings))
        yield folder


def write_settings(folder: Path, dataset: Mapping[str, Any], preset: str, changes: Mapping[str, Any]) -> None:
    """Write the dataset and the preset of a project; `changes` are settings by section, which override the preset."""
    text = (PACKAGED / "dataset" / "folder.yaml").read_text(encoding="utf-8")
    values = {**params.parse(text), **dataset}
    header = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    write(folder / "conf" / "dataset" / f"{OWN}.yaml", header + params.to_yaml(values))
    settings = f"\n{params.to_yaml(changes)}" if changes else ""
    write(folder / "conf" / "experiment" / f"{OWN}.yaml", EXPERIMENT.format(preset=preset) + settings)


def compose(folder: Path) -> dict[str, Any]:
    """Compose and validate params.yaml of a staged project, and write it; return its contents."""
    data = compose_params(conf=folder / "conf")
    params.check(data, "the new project")
    write(folder / params.FILE, to_yaml(data))
    return data


def write(path: Path, contents: str | bytes) -> None:
    """Write a new file, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(contents.encode() if isinstance(contents, str) else contents)


def require_addable(folder: Path) -> None:
    """Raise UserError if a folder has files that a new project would replace, before expensive work."""
    if (folder / "conf" / f"{conf_layers.PROJECT}.yaml").is_file():
        raise UserError(
            "This folder is a project of vqvae2 already.",
            where=folder,
            fix="Change to it, then run: vqvae2 run. Or choose another folder.",
            code=2,
        )
    clashes = [name for name in ADDED if (folder / name).exists()]
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
    """Add the files of a staged project to a folder; return their names. No existing file loses a line."""
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
    """Create a Git repository with a commit of these files, unless the folder is in one; return whether that is done.

    DVC's experiments need a commit. A hook, or a missing key to sign with, may prevent it. Without Git, DVC is set to
    work without.
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
    """Return the variables that give Git the name and the e-mail address that it lacks."""
    lacking = [key for key in ("NAME", "EMAIL") if _git(folder, "config", f"user.{key.lower()}").returncode]
    variables = [f"GIT_{role}_{key}" for role in ("AUTHOR", "COMMITTER") for key in lacking]
    return {variable: GIT_IDENTITY for variable in variables if variable not in os.environ}


def _git(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["git", *arguments], cwd=folder, env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )


def _dvc_settings() -> dict[str, str]:
    """Return the settings that `dvc exp run` and `dvc plots show` need, in lower case."""
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
    """Add the settings that a DVC repository of the user's lacks."""
    from pipeline import dvc

    config = _read_dvc_config(folder)
    for key, value in _dvc_settings().items():
        if key not in config:
            subprocess.run([*dvc.COMMAND, "config", key, value], cwd=folder, check=True, capture_output=True)
