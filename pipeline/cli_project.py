"""Commands that create, check and maintain a project."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli_common import PROJECT, AsJson, complete, run_and_exit

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

    Takes ten minutes on two fast cores, and ends with the path of the report. The same command resumes it.

    Example:  vqvae2 demo --smoke
    """

    def action() -> int:
        from pipeline.commands import demo

        return demo.run(folder, smoke=smoke)

    run_and_exit(action, require_project=False)


@app.command(rich_help_panel=PROJECT)
def doctor(as_json: AsJson = False) -> None:
    """Check this machine and this project.

    Checks packages, processors, memory, disk, settings, images and servers, and prints a fix for each problem.

    Example:  vqvae2 doctor
    """

    def action() -> int:
        from pipeline.commands import doctor

        return doctor.show(as_json=as_json)

    run_and_exit(action, require_project=False)


@app.command("sync-metrics", rich_help_panel=PROJECT)
def sync_metrics() -> None:
    """Upload metrics that the MLflow server has missed.

    All runs in runs/ are uploaded to the store that is set now, as far as it does not have them: that at
    MLFLOW_TRACKING_URI, or mlflow.db in this folder.

    Example:  vqvae2 sync-metrics
    """

    def action() -> int:
        from pipeline.commands import sync_metrics

        return sync_metrics.run()

    run_and_exit(action)


@app.command(rich_help_panel=PROJECT)
def versions(
    write: Annotated[
        bool, typer.Option("--write", help="Write the file that DVC watches; dvc.yaml calls this.")
    ] = False,
    compare: Annotated[
        str, typer.Option(metavar="REVISION", help="List the smoke pipeline's files that differ from a Git revision's.")
    ] = "",
    new: Annotated[
        bool, typer.Option("--new", help="Record a new version of every stage whose source has changed.")
    ] = False,
    same_as: Annotated[
        str,
        typer.Option(metavar="REVISION", help="Record the versions of a Git revision, if its smoke pipeline is equal."),
    ] = "",
    reason: Annotated[str, typer.Option(help="Recorded beside the version.")] = "",
) -> None:
    """Show or record the result version of each stage's source.

    A stage runs again when its version changes. Comments, docstrings, annotations, formatting and error texts do not
    change it.

    Example:  vqvae2 versions

    Example:  vqvae2 versions --same-as HEAD --reason "Renamed the encoder's layers."
    """

    def action() -> int:
        from pipeline.commands import versions

        return versions.run(write=write, compare=compare, new=new, same_as=same_as, reason=reason)

    run_and_exit(action)
