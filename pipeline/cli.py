"""The command line. Nothing heavy is imported before a command runs."""

from typing import Annotated

import typer

from pipeline import environment

app = typer.Typer(invoke_without_command=True, no_args_is_help=False, rich_markup_mode=None)
program = typer.Typer(name="vqvae2", no_args_is_help=True, rich_markup_mode=None)


@program.command()
def stage(
    name: Annotated[str, typer.Argument(help="A file in stages/, such as prior.")],
    level: Annotated[str, typer.Argument(help="The level, for a stage that runs once per level.")] = "",
) -> None:
    """Run one stage here, on the inputs in place. This is what dvc.yaml calls.

    Example:  vqvae2 stage prior top
    """
    from pipeline.launch import run_stage

    raise typer.Exit(run_stage(name, level))


@program.command()
def version() -> None: ...


def main() -> None:
    """Run the console script."""
    environment.prepare()
    program()
