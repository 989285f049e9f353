"""Parts that the modules of the command line share: options, sections of the help, completion, errors."""

import difflib
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from pipeline import process

# Sections of `vqvae2 --help`.
RUN, LOOK, MODELS, PROJECT = "Run", "Inspect", "Use models", "Project"


def complete(kind: str) -> Callable[..., list[str]]:
    """Return a completion callback for words of a kind."""

    def callback(ctx: typer.Context, incomplete: str) -> list[str]:
        from pipeline import completion

        return completion.complete(kind, incomplete, ctx.params)

    return callback


complete_setting = complete("setting")

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
Guidance = Annotated[
    float | None, typer.Option(min=0.0, help="Above 1, favour what the class makes likelier; 1 is no guidance.")
]
LevelRules = Annotated[
    list[str] | None,
    typer.Option(
        "--level",
        metavar="LEVEL.OPTION=VALUE",
        help="Change an option for one level, such as bottom.temperature=0.8. Repeatable.",
    ),
]
Model = Annotated[
    Path | None,
    typer.Option(
        "--model", "-m", metavar="FOLDER", help="Folder with vqvae/ and priors/, instead of artifacts/ of this project."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class Commands(TyperGroup):
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


class RunCommand(Commands):
    """`vqvae2 run` without subcommands; under Typer's program, `run` holds all commands."""

    def list_commands(self, ctx: Any) -> list[str]:
        return []

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name = args[0]
        suggestions = [f"vqvae2 {name}"] if name in self.commands else []
        if not suggestions or name == "sample":  # both a command and a stage
            suggestions.append(suggestion(name))
        return ctx.fail(f"run accepts options only, got {name}. Did you mean: {', or '.join(suggestions)}")


class SettingsCommand(TyperCommand):
    """Command that takes settings by -S only, and suggests them for an argument: a path is a source of images."""

    allow_extra_args = True

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        rest: list[str] = super().parse_args(ctx, args)
        if rest and not ctx.resilient_parsing:
            settings = [rest[0]] if "=" in rest[0] else ["dataset=folder", f"dataset.source={rest[0]}"]
            options = shlex.join([argument for setting in settings for argument in ("-S", setting)])
            command = f"{ctx.command_path} {options}"
            ctx.fail(f"{ctx.info_name} accepts options only, got {rest[0]}. Did you mean: {command}")
        return rest


def suggestion(argument: str) -> str:
    """Suggest the command for an argument that is a setting or a stage."""
    return f"vqvae2 run {'-S' if '=' in argument else '--stage'} {argument}"


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
