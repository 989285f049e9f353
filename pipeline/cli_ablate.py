"""Command that runs ablations."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli_common import RUN, Overrides, run_and_exit

app = typer.Typer()


@app.command(rich_help_panel=RUN)
def ablate(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Ablations. [default: all]")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Number of steps of every training.")] = None,
    overrides: Overrides = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FOLDER", help="Write the page and the tables to this folder.")
    ] = Path("runs/ablations"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", "-n", help="List the experiments, and which are finished.")
    ] = False,
) -> None:
    """Run ablations as DVC experiments, and write tables and charts of their numbers.

    conf/ablations.yaml defines them. The base settings are those of params.yaml, or conf/ with the overrides given by
    -S. Finished experiments are not run again, also after an interruption. The files of the project do not change.

    Example:  vqvae2 ablate --dry-run

    Example:  vqvae2 ablate levels quantizer --steps 300
    """

    def action() -> int:
        from pipeline.commands import ablate

        return ablate.run(names or (), overrides=overrides or (), steps=steps, out=out, dry_run=dry_run)

    run_and_exit(action)
