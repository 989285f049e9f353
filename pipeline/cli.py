"""Command line. Libraries that are slow to import are imported only by the command that needs them.

vqvae2 run --stage prior_bottom            console script
typer pipeline run --stage prior_bottom    the same through Typer's program, which runs the `app` of this module

The commands that run and show stages are here; cli_models.py, cli_project.py and cli_ablate.py have the others. To add
one, declare its arguments in one of these files, and write its work in a function `run` of pipeline/commands/NAME.py.
"""

import importlib.metadata
import os
from pathlib import Path
from typing import Annotated

import typer

from pipeline import cli_ablate, cli_models, cli_project, process
from pipeline.cli_common import (
    LOOK,
    RUN,
    AsJson,
    Commands,
    Overrides,
    RunCommand,
    SettingsCommand,
    complete,
    complete_setting,
    run_and_exit,
)

# `app` has the commands; `program` is the console script, which adds `run` as a command beside them.
app = typer.Typer(cls=Commands, invoke_without_command=True, rich_markup_mode=None)
program = typer.Typer(
    cls=Commands,
    name="vqvae2",
    help="Train VQ-VAE-2 on a folder of images and sample from it: tracked, cached, resumable.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def _show_version(requested: bool) -> None:
    if requested:
        print(f"vqvae2 {importlib.metadata.version('vqvae2')}")
        raise typer.Exit


@program.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.callback()
def run(
    ctx: typer.Context,
    stages: Annotated[
        list[str] | None,
        typer.Option(
            "--stage",
            "-s",
            metavar="STAGE",
            help="Run this stage and its dependencies, such as prior_top. Repeatable.",
            autocompletion=complete("stage"),
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Also run stages that are up to date, from the start.")
    ] = False,
    only: Annotated[bool, typer.Option("--only", help="Run the stage without its dependencies.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="Print what would run, and why.")] = False,
    pull: Annotated[
        bool, typer.Option("--pull", help="Fetch results from the DVC remote instead of computing them.")
    ] = False,
    overrides: Overrides = None,
) -> None:
    """Run out-of-date stages; restore the others from cache.

    After an interruption, run the same command again to resume. Each run with -S recomposes params.yaml from conf/ and
    the overrides given now: repeat the overrides of earlier runs to keep them.

    Example:  vqvae2 run -S experiment=smoke

    Example:  vqvae2 run --stage prior_bottom --dry-run
    """
    process.prepare()
    if ctx.invoked_subcommand:
        return

    def action() -> int:
        from pipeline.commands import run

        return run.run(stages or (), overrides=overrides or (), force=force, only=only, pull=pull, dry_run=dry_run)

    run_and_exit(action)


@app.command(rich_help_panel=LOOK)
def status(
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Refresh every two seconds, until Ctrl-C.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the state of each stage, and why it is out of date.

    Of a running or interrupted stage also shows the step, the rate, the time left and the newest checkpoint.

    Example:  vqvae2 status --watch
    """

    def action() -> int:
        from pipeline.commands import status

        return status.show(as_json=as_json, watch=watch)

    run_and_exit(action)


@app.command("config", rich_help_panel=RUN)
def compose(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, as -S of run.", autocompletion=complete_setting),
    ] = None,
    option_overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            "-S",
            metavar="KEY=VALUE",
            help="Same as KEY=VALUE. Repeatable.",
            autocompletion=complete_setting,
        ),
    ] = None,
    write: Annotated[bool, typer.Option("--write", help="Write params.yaml instead of printing it.")] = False,
) -> None:
    """Compose conf/ and overrides into params.yaml.

    Validates and prints the result. --write without overrides resets params.yaml to conf/.

    Example:  vqvae2 config experiment=clothing64 vqvae.quantizer.beta=0.5 --write
    """

    def action() -> int:
        from pipeline.commands import config

        return config.run([*(overrides or ()), *(option_overrides or ())], write=write)

    run_and_exit(action)


@app.command(cls=SettingsCommand, rich_help_panel=LOOK)
def data(
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write data.html to this folder.")] = None,
    sample: Annotated[int, typer.Option(min=0, help="Read the headers of this many images; 0 reads all.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Show the images that a run would use: splits, classes, sizes, and what is left out or doubtful.

    Reads names and headers, and changes nothing. --out writes a page with images of each class.

    Example:  vqvae2 data -S dataset=folder -S dataset.source=path/to/images --out overview
    """

    def action() -> int:
        from pipeline.commands import data

        return data.show(overrides or (), out=out, sample=sample, as_json=as_json)

    run_and_exit(action)


@app.command(cls=SettingsCommand, rich_help_panel=RUN)
def plan(
    overrides: Overrides = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run a few training steps, for about a minute, to estimate the time.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Estimate the cost of a run before it starts, and recommend a preset.

    Counts the parameters, FLOPs and checkpoint bytes of each network without computing anything. If the cluster has
    GPUs, it also counts the memory that training needs on each, and which micro-batch fits 24, 40 and 80 GB. The preset
    depends on the size and number of images, and on the GPUs of this machine.

    Example:  vqvae2 plan -S dataset=folder -S dataset.source=path/to/images -S dataset.image_size=64

    Example:  vqvae2 plan -S experiment=clothing64 --measure
    """

    def action() -> int:
        from pipeline.commands import plan

        return plan.show(overrides or (), as_json=as_json, measure=measure)

    run_and_exit(action)


for module in (cli_ablate, cli_models, cli_project):  # the order of `--help`: before those below
    app.registered_commands += module.app.registered_commands


@app.command(rich_help_panel=LOOK)
def compare(
    a: Annotated[
        str,
        typer.Argument(
            help="Run, DVC experiment, Git revision, or folder with a report.", autocompletion=complete("run")
        ),
    ],
    b: Annotated[str, typer.Argument(help="The same, or workspace.", autocompletion=complete("run"))] = "workspace",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Write the page to this file. [default: in runs/compare]"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare the settings, numbers and pictures of two runs.

    Prints the comparison, and writes a page with pictures side by side.

    Example:  vqvae2 compare HEAD

    Example:  vqvae2 compare lumpy-bird ../other/artifacts/report --out compare.html
    """

    def action() -> int:
        from pipeline.commands import compare

        return compare.run(a, b, out=out, as_json=as_json)

    run_and_exit(action)


@app.command(rich_help_panel=LOOK)
def ui(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of 127.0.0.1.")] = 5000,
    browser: Annotated[bool, typer.Option(help="Open the runs in a browser, if there is a display.")] = True,
) -> None:
    """Show the runs of this project in MLflow: start its web interface, and print the pages of the runs.

    Example:  vqvae2 ui --port 5001 --no-browser
    """

    def action() -> int:
        from pipeline.commands import ui

        return ui.serve(port, browser=browser)

    run_and_exit(action)


@app.command("stage", rich_help_panel=RUN)
def run_stage(
    name: Annotated[str, typer.Argument(help="Stage, such as vqvae or prior_top.", autocompletion=complete("stage"))],
    level: Annotated[str, typer.Argument(help="Level, if the name is without one: prior top.")] = "",
) -> None:
    """Run one stage on the inputs in artifacts/. dvc.yaml calls this command.

    Example:  vqvae2 stage prior_top
    """
    from pipeline.stage_runner import run_stage

    raise typer.Exit(run_stage(name, level))


def main() -> None:
    """Run the console script."""
    process.prepare()
    if os.environ.get("_VQVAE2_COMPLETE") == "complete_bash":
        from pipeline import completion

        completion.join_bash_words(os.environ)
    # vqvae2 run --stage X
    program.add_typer(app, name="run", cls=RunCommand, subcommand_metavar="", rich_help_panel=RUN)
    program.registered_commands += app.registered_commands  # vqvae2 status
    program(prog_name="vqvae2")
