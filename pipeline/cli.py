"""The command line. Nothing heavy is imported before a command runs.

vqvae2 run --stage prior_bottom            the console script
typer pipeline run --stage prior_bottom    the same by Typer's own program, whose `run` takes this module's `app`
"""

import dataclasses
import difflib
import importlib.metadata
import os
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pipeline import process
from stages.errors import UserError

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-S", metavar="KEY=VALUE", help="Override a setting or a choice in conf/; repeatable."),
]
Temperature = Annotated[float | None, typer.Option(min=0.01, help="Below 1: likelier codes, less variety.")]
TopK = Annotated[int | None, typer.Option(min=0, help="Of the entries; 0 keeps all.")]
TopP = Annotated[float | None, typer.Option(min=0.01, max=1.0, help="Of the probability; 1 keeps all.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class _Commands(TyperGroup):
    """Commands, `run` first. A word that is none may have been meant as a stage, or as a setting."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(self.commands, key=lambda name: name != "run")

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        word = args[0]
        meant = self.invoke_without_command and not difflib.get_close_matches(word, self.commands)
        if meant and not word.startswith("-"):
            ctx.fail(f"{word} is no command. Did you mean: {suggestion(word)}")
        return super().resolve_command(ctx, args)


class _Run(_Commands):
    """`vqvae2 run`: the other commands stand beside it, not below."""

    def list_commands(self, ctx: Any) -> list[str]:
        return []

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        word = args[0]
        hints = [f"vqvae2 {word}"] if word in self.commands else []
        if not hints or word == "sample":  # which is a command and a stage
            hints.append(suggestion(word))
        return ctx.fail(f"run takes options alone, not {word}. Did you mean: {', or '.join(hints)}")


def suggestion(word: str) -> str:
    return f"vqvae2 run {'-S' if '=' in word else '--stage'} {word}"


app = typer.Typer(cls=_Commands, invoke_without_command=True, rich_markup_mode=None)
program = typer.Typer(
    cls=_Commands,
    name="vqvae2",
    help="VQ-VAE-2 from a folder of images to samples: tracked, cached, resumable.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def _show_version(wanted: bool) -> None:
    if wanted:
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
            "--stage", "-s", metavar="STAGE", help="This stage and what it needs, such as prior_top; repeatable."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Run what is up to date, too, from the start.")] = False,
    only: Annotated[bool, typer.Option("--only", help="Run the stage alone, on the inputs in place.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="Say what would run, and why.")] = False,
    pull: Annotated[bool, typer.Option("--pull", help="Fetch what the DVC remote has instead of running it.")] = False,
    overrides: Overrides = None,
) -> None:
    """Run what changed, and restore the rest from cache.

    Run the same command again after an interruption and it resumes. What -S says is kept in params.yaml until the
    next -S, which starts from conf/ anew: name what is to stay, too.

    Example:  vqvae2 run -S experiment=smoke

    Example:  vqvae2 run --stage prior_bottom --dry-run
    """
    process.prepare()
    if ctx.invoked_subcommand:
        return
    from pipeline.commands.run import run as run_pipeline

    _guarded(
        lambda: run_pipeline(
            stages or (), overrides=overrides or (), force=force, only=only, pull=pull, dry_run=dry_run
        )
    )


@app.command()
def status(as_json: AsJson = False) -> None:
    """Show which stages are up to date, and why others are not.

    Example:  vqvae2 status --json
    """
    from pipeline.commands.status import show

    _guarded(lambda: show(as_json=as_json))


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check this machine and this folder.

    Packages, processors, memory, disk, settings, images and servers, with a fix for what is not as it should be.

    Example:  vqvae2 doctor
    """

    def examine() -> int:
        from pipeline import preflight

        findings = preflight.examine()
        if as_json:
            print(preflight.as_json(findings))
        else:
            for found in findings:
                print(f"{found.state:<8} {found.name:<14} {found.text}")
                if found.fix:
                    print(f"{'':<23} fix: {found.fix}")
        return 3 if any(found.state == "error" for found in findings) else 0

    _guarded(examine, anywhere=True)


@app.command("config")
def compose(
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="As -S of run.")] = None,
    more: Annotated[list[str] | None, typer.Option("--set", "-S", metavar="KEY=VALUE", help="The same.")] = None,
    write: Annotated[bool, typer.Option("--write", help="Write params.yaml instead of printing it.")] = False,
) -> None:
    """Compose conf/ into params.yaml, checked. Without a setting, --write goes back to what conf/ says.

    Example:  vqvae2 config experiment=clothing64 vqvae.quantizer.beta=0.5 --write
    """

    from pipeline.commands.run import config

    _guarded(lambda: config([*(overrides or ()), *(more or ())], write=write))


@app.command()
def plan(overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Count what a run will cost, before it starts.

    Parameters, arithmetic and bytes, without computing anything.

    Example:  vqvae2 plan -S experiment=imagenet256
    """
    from pipeline.commands.plan import show

    _guarded(lambda: show(overrides or (), as_json=as_json))


@app.command()
def sample(
    out: Annotated[Path, typer.Argument(help="A folder for the images.")],
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Images.")] = 16,
    classes: Annotated[
        list[str] | None, typer.Option("--class", "-c", help="A class, drawn in turn; repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Equal seeds draw equal images.")] = 0,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
) -> None:
    """Draw images from the trained priors.

    What is not said of temperature, top-k and top-p is as in params.yaml, under sample.

    Example:  vqvae2 sample drawn --count 16 --class flags --seed 3
    """

    def draw() -> int:
        from pipeline import params

        said: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        settings = params.load().sample
        try:
            config = dataclasses.replace(
                settings,
                count=count,
                classes=tuple(classes or ()),
                **{name: value for name, value in said.items() if value is not None},
            )
        except ValueError as error:
            what, fix = params.split(str(error))
            raise UserError(what, where="--temperature, --top-k, --top-p", fix=fix, code=2) from None
        from pipeline.commands import inference

        inference.sample(out, config, seed=seed)
        print(out)
        return 0

    _guarded(draw)


@app.command()
def reconstruct(
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder for the reconstructions.")] = Path("reconstructed"),
) -> None:
    """Encode and decode your own images, level by level.

    Each image is decoded from every prefix of levels, coarse to fine, and shown beside itself.

    Example:  vqvae2 reconstruct cat.png dog.jpg --out reconstructed
    """

    def encode() -> int:
        from pipeline.commands import inference

        print("\n".join(inference.reconstruct(images, out)))
        print(out)
        return 0

    _guarded(encode)


@app.command()
def ui(port: Annotated[int, typer.Option(min=1, max=65535, help="On this machine alone.")] = 5000) -> None:
    """Open MLflow's pages over the runs of this project.

    Example:  vqvae2 ui --port 5001
    """
    from pipeline.commands.ui import serve

    _guarded(lambda: serve(port))


@app.command("sync-metrics")
def sync_metrics() -> None:
    """Send MLflow what it missed while it did not answer.

    Example:  vqvae2 sync-metrics
    """

    def send() -> int:
        from stages.tracking import tracker

        sent = tracker.sync()
        print(
            f"{sent.points} points sent, {sent.missing} missing; {sent.runs} runs whole, {sent.running} still running"
        )
        if sent.trouble:
            raise UserError(
                f"MLflow did not take all: {sent.trouble}.",
                where="runs/",
                fix="Mend what it names, then run: vqvae2 sync-metrics. It sends what is still missing.",
            )
        return 1 if sent.missing else 0

    _guarded(send)


@app.command("stage")
def run_stage(
    name: Annotated[str, typer.Argument(help="A file in stages/, such as prior.")],
    level: Annotated[str, typer.Argument(help="The level, for a stage that runs once per level.")] = "",
) -> None:
    """Run one stage here, on the inputs in place.

    This is what dvc.yaml calls.

    Example:  vqvae2 stage prior top
    """
    from pipeline.stage_runner import run_stage

    raise typer.Exit(run_stage(name, level))


def main() -> None:
    """Run the console script."""
    process.prepare()
    program.add_typer(app, name="run", cls=_Run, subcommand_metavar="")  # vqvae2 run --stage X
    program.registered_commands += app.registered_commands  # vqvae2 status
    program(prog_name="vqvae2")


def _guarded(action: Callable[[], int], *, anywhere: bool = False) -> None:
    """Call, show the user's mistake as a letter and anything else as one line, and exit.

    Outside of a project's folder nothing is called, and nothing written, unless the action serves `anywhere`.
    """
    try:
        if not anywhere:
            process.require_project()
        code = action()
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        from pipeline.error_report import report
        from pipeline.stage_runner import RUNS

        code = 128 + signal.SIGPIPE if isinstance(error, BrokenPipeError) and _unread() else report(error, RUNS)
    raise typer.Exit(code)


def _unread() -> bool:
    """Say whether nobody reads what is printed any more, as behind `| head`; if so, print no more."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone
