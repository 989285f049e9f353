"""Files of settings: conf/ of a project, and conf/ of the installed package below it.

A project that `vqvae2 init` has made has the file conf/project.yaml. It is the primary config of Hydra, instead of
conf/config.yaml, and names the package's conf/ in `hydra.searchpath`: files of the project hide those of the package.
The repository, and a project with a conf/config.yaml of its own, have one layer.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGE_ROOT = Path(__file__).parents[1]  # the repository, or the package vqvae2 of the wheel, which mirrors it
PACKAGED = PACKAGE_ROOT / "conf"
PROJECT = "project"  # primary config of a project with two layers; .dvc/config names it, too


def primary(conf: Path) -> str:
    """Return the name of the config that Hydra starts from."""
    return PROJECT if (conf / f"{PROJECT}.yaml").is_file() else "config"


def layers(conf: Path) -> list[Path]:
    """Return the folders of settings, the first of which hides files of the next."""
    return [conf, PACKAGED] if primary(conf) == PROJECT else [conf]


def choices(conf: Path, group: str) -> list[str]:
    """Return the names of the files of a group."""
    return sorted({path.stem for layer in layers(conf) for path in (layer / group).glob("*.yaml")})


def primary_files(conf: Path) -> list[Path]:
    """Return the files whose defaults lists choose a file of each group; later ones override earlier ones."""
    names = (f"{primary(conf)}.yaml", "config.yaml")
    return [layer / name for layer, name in zip(layers(conf), names, strict=False)][::-1]


def choices_of(contents: Mapping[str, Any]) -> dict[str, Any]:
    """Return the choices in the defaults list of a config by group, such as prior@priors.top."""
    items = (item for item in contents.get("defaults", ()) if isinstance(item, dict))
    return {name.split()[-1].lstrip("/"): choice for item in items for name, choice in item.items()}
