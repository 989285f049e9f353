"""Errors for the user: the violation, its location and the fix, shown without a traceback."""

import errno
import os
from collections.abc import Sequence

EXIT_CODES = {
    0: "success",
    1: "the command failed",
    2: "a command, an option or a setting is invalid",
    3: "the environment is unsuitable: a missing program, a full disk, missing permissions",
    4: "data is missing, invalid or damaged",
    5: "a model or a checkpoint is damaged or does not match",
}

CLASSES_SHOWN = 20  # in an error
_PACKAGE_OF_EXTRA = {"s3": "dvc-s3", "hub": "huggingface_hub"}
_CHOOSE_OTHER_NAME = "Choose another name, or remove the existing file."
_FREE_SPACE = "Free some space, then run the same command again."
_OS_ERROR_FIXES = {
    errno.EEXIST: _CHOOSE_OTHER_NAME,
    errno.ENOTDIR: _CHOOSE_OTHER_NAME,
    errno.EACCES: "Choose another path, or fix its permissions.",
    errno.EROFS: "Choose another path: this one is mounted read-only.",
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: _FREE_SPACE,
}


def install_command(extra: str = "") -> str:
    """Return the command that installs this project, or what an extra of it adds: it is on no package index."""
    if not __name__.startswith("stages"):  # the wheel, whose file may be gone
        return f"pip install {_PACKAGE_OF_EXTRA[extra]}" if extra else "pip install --force-reinstall WHEEL"
    return "pip install -c constraints.txt -e " + (f"'.[{extra}]'" if extra else ".")


class UserError(Exception):
    """Error that the user can fix.

    what   headline: the violation and the value, one or more sentences
    where  path, setting or option that is wrong; "" if `what` names it
    fix    what to do, such as a command to run
    code   exit status, a key of EXIT_CODES
    """

    def __init__(self, what: str, *, where: object, fix: str, code: int = 1):
        super().__init__(what, str(where), fix, code)
        self.what, self.where, self.fix, self.code = what, str(where), fix, code

    def __reduce__(self):  # pickle would call __init__ with positional arguments; Ray pickles errors of workers
        return _rebuild, (type(self), self.what, self.where, self.fix, self.code)

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  in: {self.where}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)


def unknown_class(name: str, classes: Sequence[str], where: str) -> UserError:
    """Return the error for a class that images, or the training images of a model, do not have."""
    if not classes:
        return UserError(f"There are no classes, got {name!r}.", where=where, fix="Name no class.", code=2)
    more = f" and {len(classes) - CLASSES_SHOWN} more" if len(classes) > CLASSES_SHOWN else ""
    fix = f"Use any of: {', '.join(classes[:CLASSES_SHOWN])}{more}"
    return UserError(f"{name!r} is not a valid class.", where=where, fix=fix, code=2)


def from_os_error(error: BaseException, path: object = "") -> UserError | None:
    """Convert an OSError that the user can fix: an existing file, missing permissions or a full disk.

    `path` is the location to show if the error names no file. Return None for any other error.
    """
    if isinstance(error, OSError) and (where := error.filename or path) and error.errno in _OS_ERROR_FIXES:
        return UserError(f"{os.strerror(error.errno)}.", where=where, fix=_OS_ERROR_FIXES[error.errno], code=3)
    return None


def _rebuild(kind: type["UserError"], what: str, where: str, fix: str, code: int) -> "UserError":
    return kind(what, where=where, fix=fix, code=code)
