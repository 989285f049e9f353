"""Commands that create a project."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli_common import PROJECT, complete, run_and_exit

app = typer.Typer()


@app.command(rich_help_panel=PROJECT)
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the project, new or with other files.")],
    data: Annotated[
        Path | None, typer.Option("--data", metavar="PATH", help="Folder, zip or tar of images. [default: data/images]")
    ] = None,
    preset: Annotated[
        str,
        typer.Option(
            "--preset",
            metavar="NAME",
            help="Preset of settings. [default: the recommended one]",
            autocompletion=complete("preset"),
        ),
    ] = "",
) -> None:
    """Create a project for your own images.

    Writes dvc.yaml, params.yaml, conf/ and .dvc/, and creates a Git repository unless the folder is in one. Replaces no
    file. Reads names and headers of the images to recommend a preset.

    Example:  vqvae2 init plants --data ~/photos/plants
    """

    def action() -> int:
        from pipeline.commands import init

        return init.run(folder, data=data.expanduser() if data else None, preset=preset)

    run_and_exit(action, require_project=False)


@app.command(rich_help_panel=PROJECT)
def demo(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Folder of the project.")] = Path("vqvae2-demo"),
    smoke: Annotated[bool, typer.Option("--smoke", help="Use the smallest settings: a minute, and noise.")] = False,
) -> None:
    """Run all stages on 3,372 embedded emoji, in a new project.

    Takes 9 minutes on two fast cores, and ends with the path of the report. The same command resumes it.

    Example:  vqvae2 demo --smoke
    """

    def action() -> int:
        from pipeline.commands import demo

        return demo.run(folder, smoke=smoke)

    run_and_exit(action, require_project=False)
