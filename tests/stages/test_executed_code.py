"""The code that a stage's result version hashes is the code that the stage executes."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest

from pipeline import stage_source

STAGES: dict[str, Callable[[Any], None]] = {
    "shard": lambda project: project.shard(),
    "vqvae": lambda project: project.vqvae(out="executed/vqvae", fingerprint="executed"),
    "codes": lambda project: project.codes(out="executed/codes", fingerprint="executed"),
    "prior_top": lambda project: project.prior("top", out="executed/priors", fingerprint="executed"),
    "prior_bottom": lambda project: project.prior("bottom", out="executed/priors", fingerprint="executed"),
    "sample": lambda project: project.sample(out="executed/samples", fingerprint="executed"),
    "evaluate": lambda project: project.evaluate(out="executed/report", fingerprint="executed"),
}


@contextmanager
def executed_functions() -> Iterator[set[str]]:
    """Collect the dotted names of the functions of stages/ and models/ that run in the block."""
    names: set[str] = set()

    def trace(frame: FrameType, event: str, argument: object) -> None:
        module = str(frame.f_globals.get("__name__"))
        generated = frame.f_code.co_filename == "<string>"  # methods that `dataclass` and `NamedTuple` generate
        anonymous = frame.f_code.co_qualname.startswith("<")  # an import, or a lambda that belongs to a constant
        finalizer = frame.f_code.co_name == "__del__"  # of any object that is collected meanwhile
        if (
            event == "call"
            and not (generated or anonymous or finalizer)
            and module.split(".")[0] in stage_source.PACKAGES
        ):
            names.add(f"{module}.{frame.f_code.co_qualname}".partition(".<")[0])

    sys.setprofile(trace)
    try:
        yield names
    finally:
        sys.setprofile(None)


@pytest.mark.parametrize("stage", STAGES)
def test_every_function_that_runs_is_hashed(stage: str, project, in_process):
    """Every executed function is part of the stage's source or excluded with a reason."""
    module, _, level = stage.partition("_")
    network = project.priors[level].name if level else ""
    hashed = stage_source.source_of(module, network).definitions.keys()
    with executed_functions() as names:
        STAGES[stage](project)
    assert names
    included = {name for name in names if not stage_source.is_excluded(name, module)}
    assert {name for name in included if not any(f"{name}.".startswith(f"{prefix}.") for prefix in hashed)} == set()
