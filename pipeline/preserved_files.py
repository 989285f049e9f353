"""Files that a command changes only until it ends: DVC reads settings and result versions from the project's files."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pipeline import params


@contextmanager
def preserve_files(*paths: Path) -> Iterator[Callable[[], object]]:
    """Restore the contents and times of files when the block ends, however it ends.

    Yields a function that keeps the changes instead.
    """
    with ExitStack() as restorations:
        for path in paths:
            contents = path.read_bytes() if path.is_file() else None
            restorations.callback(_restore, path, contents, path.stat().st_mtime_ns if contents is not None else 0)
        yield restorations.pop_all


def _restore(path: Path, contents: bytes | None, time_ns: int) -> None:
    if contents is None:
        path.unlink(missing_ok=True)
        return
    if not path.is_file() or path.read_bytes() != contents:
        params.write(contents, path)
    if path.stat().st_mtime_ns != time_ns:
        os.utime(path, ns=(time_ns, time_ns))  # `params_drift` compares that of params.yaml with those of conf/
