"""What a person starts: command line, settings, launching. `typer pipeline run` finds the program as `app`."""

from typing import Any


def __getattr__(name: str) -> Any:
    # Typer executes this file outside of sys.modules, so nothing may be defined here; and `import pipeline` is cheap.
    if name == "app":
        from pipeline.cli import app

        return app
    raise AttributeError(name)


def __dir__() -> list[str]:
    return [*globals(), "app"]
