"""Cache of a result computed from source code: a JSON file beside Python's compiled files.

Parsing the source takes two seconds, and every command and every stage needs its hashes.
"""

import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from stages.formats.artifact import atomic_write

FileState = tuple[Path, int, int]  # time of the last change in nanoseconds, and bytes
DIGITS = 32  # hexadecimal digits of a hash in a file's name


def load_or_compute(parsers: Sequence[Path], files: Sequence[Path], root: Path, compute: Callable[[], Any]) -> Any:
    """Return the result of `compute`: the saved one, if an earlier process saved it for the same source.

    The result must be JSON data. `files` below `root` are the source, and `parsers` the modules that parse it. The JSON
    file is beside the compiled file of the first parser. Its name has a hash of all these files' contents, so it is
    never out of date.
    """
    return _load_or_compute(parsers[0], file_states((*parsers, *files)), root, compute)


def file_states(files: Iterable[Path]) -> tuple[FileState, ...]:
    """Return what changes when a file is edited: keys of what this process has computed from them."""
    return tuple((path, path.stat().st_mtime_ns, path.stat().st_size) for path in files)


@lru_cache(maxsize=2)
def _load_or_compute(parser: Path, states: tuple[FileState, ...], root: Path, compute: Callable[[], Any]) -> Any:
    digest = hashlib.sha256()
    for path, *_ in states:
        name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
        contents = path.read_bytes()
        digest.update(f"{name}\0{len(contents)}\0".encode())
        digest.update(contents)
    compiled = Path(importlib.util.cache_from_source(str(parser)))  # stage_source.cpython-311.pyc
    saved = compiled.with_name(f"{compiled.stem}-{digest.hexdigest()[:DIGITS]}.json")
    with suppress(OSError, ValueError):
        return json.loads(saved.read_text(encoding="utf-8"))
    result = compute()
    if not sys.dont_write_bytecode:
        with suppress(OSError):
            saved.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(saved) as temporary:
                temporary.write_text(json.dumps(result), encoding="utf-8")
            for other in set(saved.parent.glob(f"{compiled.stem}-*.json")) - {saved}:  # of earlier source
                other.unlink(missing_ok=True)
    return result
