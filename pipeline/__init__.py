"""Command line, settings and runs of the pipeline. `typer pipeline run` looks up the program as `app`."""

from typing import Any


def __getattr__(name: str) -> Any:
    # Typer executes this file outside of sys.modules, so it must define nothing. `import pipeline` stays fast.
    if name == "app":
        from pipeline.cli import app

        return app
    raise AttributeError(name)


def __dir__() -> list[str]:
    return [*globals(), "app"]
