"""Error messages on the terminal and the exit status that goes with each."""

import sys
import tempfile
import traceback
from pathlib import Path

from stages.errors import UserError, from_os_error
from stages.tracking.journal import without_secrets


def report(error: BaseException, folder: Path) -> int:
    """Print an error as its reader needs it; return the exit status."""
    mistake = _user_error(error) or from_os_error(error)
    if mistake is not None:
        print(f"error: {without_secrets(str(mistake))}", file=sys.stderr)
        return mistake.code
    log = folder / "error.log"
    trace = without_secrets("".join(traceback.format_exception(error))).encode(errors="backslashreplace")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log.write_bytes(trace)
    except OSError:  # what fails on a full or a read-only disk is told there too
        log = Path(tempfile.gettempdir()) / "vqvae2-error.log"
        log.write_bytes(trace)
    cause = getattr(error, "cause", None) or error  # what Ray has wrapped begins with lines of Ray's own
    first = (without_secrets(str(cause)).strip() or "no message").splitlines()[0]
    print(f"error: {type(cause).__name__}: {first}\n  traceback: {log}", file=sys.stderr)
    return 1


def _user_error(error: BaseException | None, depth: int = 0) -> UserError | None:
    """Find the user's mistake inside the errors that Ray wraps around what a worker raises."""
    if error is None or isinstance(error, UserError) or depth > 8:
        return error if isinstance(error, UserError) else None
    inside = [error.__cause__, getattr(error, "cause", None), *getattr(error, "worker_failures", {}).values()]
    for each in inside:
        if isinstance(each, BaseException) and (found := _user_error(each, depth + 1)):
            return found
    return None
