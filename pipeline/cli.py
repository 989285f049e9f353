"""Command line. Libraries that are slow to import are imported only by the command that needs them.

vqvae2 run --stage prior_bottom            console script
typer pipeline run --stage prior_bottom    the same through Typer's program, which runs the `app` of this module
"""

import difflib
import importlib.metadata
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pipeline import process

# Sections of `vqvae2 --help`.
RUN, LOOK, MODELS, PROJECT = "Run", "Look", "Use models", "Project"


def _complete(kind: str) -> Callable[..., list[str]]:
    """Return a completion callback for words of a kind."""

    def callback(ctx: typer.Context, incomplete: str) -> list[str]:
        from pipeline import completion

        return completion.complete(kind, incomplete, ctx.params)

    return callback


complete_setting = _complete("setting")

Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-S",
        metavar="KEY=VALUE",
        help="Override a setting, or choose a file of a group in conf/. Repeatable.",
        autocompletion=complete_setting,
    ),
]
Temperature = Annotated[
    float | None, typer.Option(min=0.01, help="Divide the logits by this. Below 1, samples vary less.")
]
TopK = Annotated[int | None, typer.Option(min=0, help="Sample from the k likeliest entries; 0 keeps all.")]
TopP = Annotated[
    float | None,
    typer.Option(min=0.01, max=1.0, help="Sample from the likeliest entries with this total probability; 1 keeps all."),
]
Model = Annotated[
    Path | None,
    typer.Option(
        "--model", "-m", metavar="FOLDER", help="Folder with vqvae/ and priors/, instead of artifacts/ of this project."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class _Commands(TyperGroup):
    """Command group that lists `run` first and suggests options for an unknown command: a stage, or a setting."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(self.commands, key=lambda name: name != "run")

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        commands = [(name, self.commands[name]) for name in self.list_commands(ctx)]
        longest = max((len(name) for name, _ in commands), default=0)
        for section in (RUN, LOOK, MODELS, PROJECT):
            rows = [
                (name, command.get_short_help_str(formatter.width - 6 - longest))
                for name, command in commands
                if (getattr(command, "rich_help_panel", None) or PROJECT) == section
            ]
            if rows:
                with formatter.section(section):
                    formatter.write_dl(rows)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name = args[0]
        is_misspelt = bool(difflib.get_close_matches(name, self.commands))
        if self.invoke_without_command and not is_misspelt and not name.startswith("-"):
            ctx.fail(f"{name} is not a valid command. Did you mean: {suggestion(name)}")
        return super().resolve_command(ctx, args)


class _RunCommand(_Commands):
    """`vqvae2 run` without subcommands; under Typer's program, `run` holds all commands."""

    def list_commands(self, ctx: Any) -> list[str]:
        return []

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name = args[0]
        suggestions = [f"vqvae2 {name}"] if name in self.commands else []
        if not suggestions or name == "sample":  # both a command and a stage
            suggestions.append(suggestion(name))
        return ctx.fail(f"run accepts options only, got {name}. Did you mean: {', or '.join(suggestions)}")


def suggestion(argument: str) -> str:
    """Suggest the command for an argument that is a setting or a stage."""
    return f"vqvae2 run {'-S' if '=' in argument else '--stage'} {argument}"


# `app` has the commands; `program` is the console script, which adds `run` as a command beside them.
app = typer.Typer(cls=_Commands, invoke_without_command=True, rich_markup_mode=None)
program = typer.Typer(
    cls=_Commands,
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
            autocompletion=_complete("stage"),
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


@app.command(rich_help_panel=LOOK)
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


@app.command(rich_help_panel=RUN)
def plan(overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Estimate the cost of a run before it starts.

    Counts the parameters, FLOPs and checkpoint bytes of each network without computing anything.

    Example:  vqvae2 plan -S experiment=imagenet256
    """

    def action() -> int:
        from pipeline.commands import plan

        return plan.show(overrides or (), as_json=as_json)

    run_and_exit(action)


@app.command(rich_help_panel=MODELS)
def sample(
    out: Annotated[Path, typer.Argument(help="Write the images to this folder, and nothing else.")],
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Number of images.")] = 16,
    classes: Annotated[
        list[str] | None,
        typer.Option(
            "--class",
            "-c",
            help="Draw images of this class, or of several in turn. Repeatable.",
            autocompletion=_complete("class"),
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal images.")] = 0,
    model: Model = None,
    sheet: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the contact sheet to this PNG file. [default: OUT.png]")
    ] = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
) -> None:
    """Draw images from the trained priors.

    Replaces an earlier draw in the same folder. Temperature, top-k and top-p default to the section `sample` of
    params.yaml; with --model, to those of FOLDER/samples if it exists.

    Example:  vqvae2 sample drawn --count 16 --class flags --seed 3

    Example:  vqvae2 sample drawn --model ../other/artifacts
    """

    def action() -> int:
        from pipeline.commands import sample

        return sample.run(
            out,
            count,
            classes or (),
            seed=seed,
            model=model,
            sheet=sheet,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )

    run_and_exit(action, require_project=model is None)


@app.command(rich_help_panel=MODELS)
def reconstruct(
    images: Annotated[list[Path], typer.Argument(help="Image files to reconstruct.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Write the reconstructions to this folder.")] = Path(
        "reconstructed"
    ),
    model: Model = None,
) -> None:
    """Encode and decode your own images.

    Decodes each image from every prefix of levels, coarse to fine, and writes it next to its reconstructions. Replaces
    earlier reconstructions in the same folder.

    Example:  vqvae2 reconstruct cat.png dog.jpg --out reconstructed
    """

    def action() -> int:
        from pipeline.commands import reconstruct

        return reconstruct.run(images, out, *([model] if model else []))

    run_and_exit(action, require_project=model is None)


@app.command(rich_help_panel=MODELS)
def export(
    what: Annotated[str, typer.Argument(metavar="samples|images", help="Drawn samples, or images of the dataset.")],
    out: Annotated[Path, typer.Argument(help="An .npz file, or a folder for PNG files.")],
    split: Annotated[str, typer.Option(help="Split of the images: train, validation or test.")] = "train",
    count: Annotated[int, typer.Option("--count", "-n", min=0, help="Number of images, from the first; 0: all.")] = 0,
) -> None:
    """Write samples or dataset images for other programs that evaluate them.

    An .npz file has the images as arr_0 (uint8, N x H x W x 3) and their labels as arr_1. A folder has PNG files.

    Example:  vqvae2 export samples samples.npz

    Example:  vqvae2 export images validation --split validation
    """

    def action() -> int:
        from pipeline.commands import export

        return export.run(what, out, split=split, count=count)

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


@app.command("sync-metrics", rich_help_panel=PROJECT)
def sync_metrics() -> None:
    """Upload metrics that the MLflow server has missed.

    Example:  vqvae2 sync-metrics
    """

    def action() -> int:
        from pipeline.commands import sync_metrics

        return sync_metrics.run()

    run_and_exit(action)


@app.command("stage", rich_help_panel=RUN)
def run_stage(
    name: Annotated[str, typer.Argument(help="Stage, such as vqvae or prior_top.", autocompletion=_complete("stage"))],
    level: Annotated[str, typer.Argument(help="Level, if the name is without one: prior top.")] = "",
) -> None:
    """Run one stage on the inputs in artifacts/. dvc.yaml calls this command.

    Example:  vqvae2 stage prior_top
    """
    from pipeline.stage_runner import run_stage

    raise typer.Exit(run_stage(name, level))


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


def main() -> None:
    """Run the console script."""
    process.prepare()
    if os.environ.get("_VQVAE2_COMPLETE") == "complete_bash":
        from pipeline import completion

        completion.join_bash_words(os.environ)
    # vqvae2 run --stage X
    program.add_typer(app, name="run", cls=_RunCommand, subcommand_metavar="", rich_help_panel=RUN)
    program.registered_commands += app.registered_commands  # vqvae2 status
    program(prog_name="vqvae2")


def run_and_exit(action: Callable[[], int], *, require_project: bool = True) -> None:
    """Run an action, print its error if it fails, and exit with its status.

    With `require_project`, it is an error to run it outside of a project's folder.
    """
    try:
        if require_project:
            process.require_project()
        code = action()
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except Exception as error:
        from pipeline.error_report import report
        from pipeline.stage_runner import RUNS

        is_closed = isinstance(error, BrokenPipeError) and process.discard_output_if_closed()
        code = 128 + signal.SIGPIPE if is_closed else report(error, RUNS)
    raise typer.Exit(code)
