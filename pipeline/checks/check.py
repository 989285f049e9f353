"""Checks of the machine, the project and its servers, which `vqvae2 doctor` and every run share."""

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from stages.config import Params
from stages.errors import UserError, from_os_error
from stages.tracking.journal import redact_secrets


@dataclass(frozen=True)
class Request:
    """Run to check: its settings, the source of the settings, and the stages that will run, as DVC names them.

    With `pull`, results may come from the DVC remote, so neither images nor GPUs are required.
    """

    settings: Params
    where: str
    stages: Collection[str]
    pull: bool = False
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)


class Answer(NamedTuple):
    """Answer of a check that does not prevent a run; with a fix, it is a warning."""

    text: str
    fix: str = ""


Subject = TypeVar("Subject")
# A check raises UserError if a run cannot succeed.
EnvironmentCheck = Callable[[Mapping[str, str]], Answer]
SettingsCheck = Callable[[Request], Answer]


@dataclass(frozen=True)
class CheckResult:
    """Result of one check."""

    name: str
    state: str  # "ok", "warning" or "error"
    text: str
    fix: str = ""


def result_of(name: str, check: Callable[[Subject], Answer], subject: Subject) -> CheckResult:
    """Run a check and return its result, without credentials; a UserError becomes a result as well."""
    state, text, fix = _run(check, subject)
    return CheckResult(name, state, redact_secrets(text), redact_secrets(fix))


def _run(check: Callable[[Subject], Answer], subject: Subject) -> tuple[str, str, str]:
    """Return the state, the text and the fix of a check."""
    try:
        answer = check(subject)
    except UserError as error:
        return "error", f"{error.what} ({error.where})" if error.where else error.what, error.fix
    except OSError as error:
        user_error = from_os_error(error)
        return "error", str(error), user_error.fix if user_error else "Fix what the message names."
    return "warning" if answer.fix else "ok", answer.text, answer.fix
