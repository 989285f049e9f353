"""Error messages on the terminal, and the exit status of each error."""

import sys
import tempfile
import traceback
from pathlib import Path

from stages.errors import UserError, from_os_error
from stages.tracking.journal import redact_secrets

MAX_DEPTH = 8  # of nested errors; Ray wraps an error of a worker several times


def report(error: BaseException, folder: Path) -> int:
    """Print an error and return the exit status.

    A UserError is printed as it is. Of any other error one line is printed, and its traceback is written to error.log
    in `folder`.
    """
    user_error = _find_user_error(error) or from_os_error(error)
    if user_error is not None:
        print(f"error: {redact_secrets(str(user_error))}", file=sys.stderr)
        return user_error.code
    log = folder / "error.log"
    trace = redact_secrets("".join(traceback.format_exception(error))).encode(errors="backslashreplace")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log.write_bytes(trace)
    except OSError:  # a full or read-only disk
        log = Path(tempfile.gettempdir()) / "vqvae2-error.log"
        log.write_bytes(trace)
    cause = getattr(error, "cause", None) or error  # the text of Ray's wrapper begins with lines about Ray
    first_line = (redact_secrets(str(cause)).strip() or "no message").splitlines()[0]
    print(f"error: {type(cause).__name__}: {first_line}\n  traceback: {log}", file=sys.stderr)
    return 1


def _find_user_error(error: BaseException | None, depth: int = 0) -> UserError | None:
    """Find the UserError inside the errors that Ray wraps around one from a worker."""
    if error is None or isinstance(error, UserError) or depth > MAX_DEPTH:
        return error if isinstance(error, UserError) else None
    causes = [error.__cause__, getattr(error, "cause", None), *getattr(error, "worker_failures", {}).values()]
    for cause in causes:
        if isinstance(cause, BaseException) and (user_error := _find_user_error(cause, depth + 1)):
            return user_error
    return None
