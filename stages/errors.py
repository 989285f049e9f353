"""The one error a user is meant to see: what happened, where, and what to do about it."""


class UserError(Exception):
    """Something the user can mend. Shown without a traceback; `code` is the exit status.

    Codes: 1 failed, 2 wrong use or setting, 3 environment, 4 data, 5 checkpoint or model file.
    """

    def __init__(self, what: str, *, where: object = "", fix: str = "", code: int = 1):
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


def _rebuild(kind: type["UserError"], what: str, where: str, fix: str, code: int) -> "UserError":
    return kind(what, where=where, fix=fix, code=code)
