"""The one error a user is meant to see: what happened, where, and what to do about it."""

import errno
import os


class UserError(Exception):
    """Something the user can mend. Shown without a traceback; `code` is the exit status.

    Codes: 1 failed, 2 wrong use or setting, 3 environment, 4 data, 5 checkpoint or model file.
    """

    def __init__(self, what: str, *, where: object, fix: str, code: int = 1):
        super().__init__(what, str(where), fix, code)
        self.what, self.where, self.fix, self.code = what, str(where), fix, code

    def __reduce__(self):  # crosses process borders whole
        return _rebuild, (type(self), self.what, self.where, self.fix, self.code)

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  in: {self.where}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)


def from_os_error(error: BaseException, place: object = "") -> UserError | None:
    """Word what the system says of a file, or else of a place: it is taken, may not be written, or the disk is full."""
    fixes = {
        errno.EEXIST: "Choose another name, or remove what stands there.",
        errno.ENOTDIR: "Choose another name, or remove what stands there.",
        errno.EACCES: "Choose another place, or mend its permissions.",
        errno.EROFS: "Choose another place: this one is mounted read-only.",
        errno.ENOSPC: "Free some space, then run the same command again.",
        errno.EDQUOT: "Free some space, then run the same command again.",
    }
    if isinstance(error, OSError) and (where := error.filename or place) and error.errno in fixes:
        return UserError(f"{os.strerror(error.errno)}.", where=where, fix=fixes[error.errno], code=3)
    return None


def _rebuild(kind: type["UserError"], what: str, where: str, fix: str, code: int) -> "UserError":
    return kind(what, where=where, fix=fix, code=code)
