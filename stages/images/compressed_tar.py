"""Compressed tars: a stage that reads one at random decompresses it to a temporary file first."""

import bz2
import gzip
import lzma
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from stages.errors import UserError

COPY_AGAIN = "Download or copy the file again."
_COMPRESSIONS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}  # by first bytes
READ_ERRORS = (EOFError, OSError, zlib.error, lzma.LZMAError)
_COPIED_BYTES = 1 << 20  # at once
# Free space that decompression leaves on the disk: a few megabytes can decompress to any size.
RESERVED_DISK_BYTES = 1 << 28


def decompress(path: Path, target: Path, report: Callable[[str], None]) -> Path | None:
    """Write the contents of a compressed tar to `target`, unless an earlier run has; return `target`, else None.

    A compressed tar has no random access: each shard would be decompressed from its start. Raises UserError if the tar
    is damaged, or if the disk would have less than RESERVED_DISK_BYTES left; the partial file is deleted. Only one
    process at a time may call this for a target.
    """
    opener = decompressor(path) if path.is_file() else None
    if opener is None:
        return None
    if target.is_file():
        return target
    report(f"Decompressing {path.name} to {target}, for random access. It is deleted at the end of the stage.")
    target.parent.mkdir(parents=True, exist_ok=True)
    for partial in target.parent.glob(f".{target.name}.*"):  # of a process that was killed
        partial.unlink(missing_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with opener(path, "rb") as source, temporary.open("wb") as file:
            _copy(source, file, path, target)
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _copy(source: BinaryIO, file: BinaryIO, path: Path, target: Path) -> None:
    written = 0
    while True:
        try:
            block = source.read(_COPIED_BYTES)
        except READ_ERRORS as error:
            raise damaged_tar(path, error) from None
        if not block:
            return
        if shutil.disk_usage(target.parent).free < RESERVED_DISK_BYTES + len(block):
            raise _no_space(f"its disk would have less than {RESERVED_DISK_BYTES} bytes left", written, path, target)
        try:
            file.write(block)
        except OSError as error:
            raise _no_space(str(error.strerror), written, path, target) from None
        written += len(block)


def _no_space(reason: str, written: int, path: Path, target: Path) -> UserError:
    return UserError(
        f"{path.name} cannot be decompressed: {reason}, after {written} bytes.",
        where=target.parent,
        fix=f"Check that the tar is the right one. Free some space there, or decompress it elsewhere and set "
        f"dataset.source to the .tar: {path}",
        code=3,
    )


def decompressor(path: Path) -> Callable[..., BinaryIO] | None:
    """Return the function that opens a compressed file; None if it is not compressed."""
    with path.open("rb") as file:
        signature = file.read(6)
    return next((opener for magic, opener in _COMPRESSIONS.items() if signature.startswith(magic)), None)  # type: ignore[return-value]


def damaged_tar(path: Path, error: Exception) -> UserError:
    return UserError(f"The tar is damaged or truncated: {error}.", where=path, fix=COPY_AGAIN, code=4)
