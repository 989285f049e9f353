"""`vqvae2 demo`: all stages on the images that the package embeds, in a new project."""

import os
from pathlib import Path

from pipeline import conf_layers, new_project
from pipeline.commands import config, init
from pipeline.commands.run import run as run_stages

IMAGES = Path("data/fluent-emoji-64.zip")
README_SETTINGS = (
    "The settings are those of the package; `vqvae2 config` shows them. "
    "A file in `conf/` replaces the file of the same name in the package."
)
SMOKE = ("experiment=smoke",)


def run(folder: Path, *, smoke: bool) -> int:
    """Create the project in a folder, if it is not there, and run it; return the exit status.

    The same command resumes an interrupted run. The settings are those of `make demo` in the repository, or with
    `smoke` the smallest ones.
    """
    if not is_demo(folder):
        create(folder)
    os.chdir(folder)
    config.run(SMOKE if smoke else (), write=True)
    status = run_stages()
    if not status:
        print(f"project       {Path.cwd()}")
    return status


def is_demo(folder: Path) -> bool:
    """Return whether a folder is a project of this command."""
    return (folder / "conf" / f"{conf_layers.PROJECT}.yaml").is_file() and (folder / IMAGES).is_file()


def create(folder: Path) -> None:
    """Create the project in a folder. Raises UserError if the folder has files that would be replaced."""
    new_project.require_addable(folder)
    primary_config = new_project.PRIMARY_CONFIG.format(defaults="")
    with new_project.temporary_project(init.project_name(folder), primary_config, README_SETTINGS) as project:
        new_project.write(project / IMAGES, (conf_layers.PACKAGE_ROOT / IMAGES).read_bytes())
        new_project.compose(project)
        folder.mkdir(parents=True, exist_ok=True)
        written = new_project.add(project, folder)
    is_committed = new_project.initialize_git(folder, written)
    if not is_committed and (folder / ".git").exists():
        print(new_project.COMMIT_HINT)
