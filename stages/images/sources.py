"""Sources of image files: a folder, a zip or a tar, read in place.

Archives are never extracted: members are listed by name and read into memory one at a time, each at most
MAX_FILE_BYTES. So a member named ../x cannot be written outside, links and devices are never followed, and a
decompression bomb in a zip costs at most MAX_FILE_BYTES of memory. A compressed tar is decompressed to a file as a
whole, until the disk has only RESERVED_DISK_BYTES left (compressed_tar.py). Names in folders and tars may hold any
bytes (surrogateescape).

To add a kind of source, write a class with the methods of `Source` and open it in `open_source`.
"""

import difflib
import io
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol, Self

from stages.errors import UserError
from stages.images.compressed_tar import COPY_AGAIN, READ_ERRORS, damaged_tar, decompressor

MAX_FILE_BYTES = 1 << 28  # 256 MiB: larger than any image worth training on
_MAX_TAR_HEADER_BYTES = 1 << 20  # of a tar's long names, which tarfile reads into memory; real ones have hundreds
_UTF8_FLAG = 0x800  # of a zip's member: the name is UTF-8
_UNICODE_PATH_FIELD = 0x7075  # Info-ZIP's extra field: version, CRC-32 of the other name, name in UTF-8
_ZIP64_RECORDS_BYTES = 56 + 20  # end record and locator of a large zip, directly before the usual end record
_MAX_END_RECORD_BYTES = 22 + 65_535 + _ZIP64_RECORDS_BYTES  # with the longest comment
_HIDDEN = ("__MACOSX", "Thumbs.db", "desktop.ini")  # beside names that begin with a dot
_SET_SOURCE = "Set dataset.source to a folder, a zip or a tar of images."


class Member(NamedTuple):
    """One file of a source."""

    name: str  # relative path, parts joined by /
    location: int  # position that the source reads it by: index in a zip, offset in a tar, 0 in a folder
    size: int  # bytes
    problem: str = ""  # why it must not be read; "" if it may


class UnreadableFile(Exception):
    """A file of a source that cannot be read. The message is the reason."""


class Source(Protocol):
    """Image files by name."""

    messages: Sequence[str]  # assumptions about the names, complete after `members`

    def members(self) -> Iterator[Member]:
        """List every file that is not hidden. Raises UserError if the source is damaged."""

    def read(self, member: Member) -> bytes:
        """Read one file. Raises UnreadableFile if it cannot be read or differs from the listing."""

    def read_start(self, member: Member, size: int) -> bytes:
        """Read at most the first `size` bytes of a file. Raises UnreadableFile if it cannot be read."""


def open_source(path: Path, decompressed: Path | None = None) -> Source:
    """Open a folder, a zip or a tar, plain or compressed. Raises UserError if `path` is none of these.

    A compressed tar is read from `decompressed`, if given.
    """
    if not path.exists():
        fix = f"Did you mean {similar}?" if (similar := _similar_path(path)) else _SET_SOURCE
        raise UserError("The source of images does not exist.", where=path, fix=fix, code=2)
    if path.is_dir():
        return FolderSource(path)
    if not path.is_file():
        raise _not_an_archive(path)
    with path.open("rb") as file:
        signature = file.read(4)
    return ZipSource(path) if signature[:2] == b"PK" else TarSource(path, decompressed)


def _similar_path(path: Path) -> Path | None:
    """Return the path whose first missing part is replaced by a similar name beside it; None if that does not exist."""
    try:
        folder = next(parent for parent in path.parents if parent.is_dir())
        missing, *rest = path.relative_to(folder).parts
        names = difflib.get_close_matches(missing, sorted(entry.name for entry in folder.iterdir()))
    except (OSError, StopIteration):
        return None
    return next((similar for name in names if (similar := folder.joinpath(name, *rest)).exists()), None)


def printable(name: str) -> str:
    """Escape control characters and bytes that are not UTF-8, so that a name is safe to print."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in name)


def _not_an_archive(path: Path) -> UserError:
    return UserError("The source of images is not a folder, a zip or a tar.", where=path, fix=_SET_SOURCE, code=2)


def _hidden(name: str) -> bool:
    return any(part.startswith(".") or part in _HIDDEN for part in name.split("/") if part not in (".", ".."))


def _size_problem(size: int) -> str:
    return f"{size} bytes is more than {MAX_FILE_BYTES}" if size > MAX_FILE_BYTES else ""


def _name_problem(name: str) -> str:
    return "the name leads outside the archive" if name.startswith("/") or ".." in name.split("/") else ""


def _normalize(name: str) -> str:
    """Remove empty parts and "." from the name of a member; names that lead outside the archive stay so."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return "/" * name.startswith("/") + "/".join(parts)


class FolderSource:
    """Source of the files under a folder. Follows links to files; refuses links to folders: DVC does not track them."""

    messages: Sequence[str] = ()

    def __init__(self, path: Path):
        self.path = path

    def members(self) -> Iterator[Member]:
        yield from self._walk("")

    def _walk(self, prefix: str) -> Iterator[Member]:
        try:
            names = sorted(path.name for path in (self.path / prefix).iterdir())
        except OSError as error:
            yield Member(prefix, 0, 0, error.strerror or "cannot be read")
            return
        folders = []
        for name in (name for name in names if not _hidden(name)):
            path = f"{prefix}{name}"
            try:
                status = (self.path / path).stat()
            except OSError as error:  # a dangling link, or a link to itself
                yield Member(path, 0, 0, error.strerror or "cannot be read")
                continue
            if stat.S_ISDIR(status.st_mode):
                if (self.path / path).is_symlink():
                    raise UserError(
                        "The source contains a link to a folder, whose changes DVC does not track.",
                        where=self.path / path,
                        fix="Replace the link with the folder itself, or with hard links to its files: cp -rlL.",
                        code=4,
                    )
                folders.append(path)
            elif stat.S_ISREG(status.st_mode):
                yield Member(path, 0, status.st_size, _size_problem(status.st_size))
            else:
                yield Member(path, 0, 0, "not a regular file")
        for path in folders:
            yield from self._walk(f"{path}/")

    def read(self, member: Member) -> bytes:
        data = self.read_start(member, member.size + 1)  # one more, to notice a file that has grown
        if len(data) != member.size:
            raise UnreadableFile("the file changed after it was listed")
        return data

    def read_start(self, member: Member, size: int) -> bytes:
        try:
            with (self.path / member.name).open("rb") as file:
                return file.read(size)
        except OSError as error:
            raise UnreadableFile(f"cannot be read: {error.strerror}") from None


class ZipSource:
    """Source of the members of a zip."""

    def __init__(self, path: Path):
        self.messages: Sequence[str] = ()
        try:
            self._zip = zipfile.ZipFile(path)
            self._infos = self._zip.infolist()
            with path.open("rb") as file:
                expected = _stated_entries(file)
            # A damaged length in the central directory makes one record swallow the records behind it; zipfile does
            # not compare the counts. Some programs store the count modulo 2**16.
            if expected is not None and (len(self._infos) - expected) % 65_536:
                raise zipfile.BadZipFile(f"it lists {len(self._infos)} files, not {expected}")
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise UserError(f"The zip is damaged: {error}.", where=path, fix=COPY_AGAIN, code=4) from None

    def members(self) -> Iterator[Member]:
        legacy_names = []
        for location, info in enumerate(self._infos):
            name, is_legacy = _zip_name(info)
            name = name.partition("\0")[0]
            if info.create_system == 0 and "/" not in name:  # some Windows programs write backslashes
                name = name.replace("\\", "/")
            file_type = stat.S_IFMT(info.external_attr >> 16)
            if name.endswith("/") or _hidden(name):
                continue
            name = _normalize(name)
            if is_legacy:
                legacy_names.append(name)
            problem = _name_problem(name) or _size_problem(info.file_size)
            if file_type not in (0, stat.S_IFREG):
                problem = "a link or a device"
            elif info.flag_bits & 1:
                problem = "encrypted"
            yield Member(name, location, info.file_size, problem)
        if legacy_names:
            self.messages = [
                f"{len(legacy_names)} names in the zip are not UTF-8 and are read as code page 437, such as "
                f"{printable(legacy_names[0])}."
            ]

    def read(self, member: Member) -> bytes:
        data = self.read_start(member, member.size)
        if len(data) != member.size:
            raise UnreadableFile("shorter than the zip states")
        return data

    def read_start(self, member: Member, size: int) -> bytes:
        try:
            with self._zip.open(self._infos[member.location]) as file:
                return file.read(size)
        except Exception as error:  # zipfile, zlib, lzma and bz2 raise errors of many types on damaged bytes
            raise UnreadableFile(f"cannot be read from the zip: {error or type(error).__name__}") from None


def _zip_name(info: zipfile.ZipInfo) -> tuple[str, bool]:
    """Decode the name of a member; also return whether it was read as code page 437, for want of UTF-8.

    Without the UTF-8 flag, zipfile decodes as code page 437; macOS writes UTF-8 without the flag.
    """
    if info.flag_bits & _UTF8_FLAG:
        return info.orig_filename, False
    raw = info.orig_filename.encode("cp437")
    try:
        return _unicode_path(info.extra, raw) or raw.decode(), False
    except UnicodeDecodeError:
        return info.orig_filename, True


def _unicode_path(extra: bytes, raw_name: bytes) -> str:
    """Return the name in Info-ZIP's extra field, if there is one for `raw_name`; else "".

    Raises UnicodeDecodeError if it is not UTF-8.
    """
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        field, extra = extra[4 : 4 + length], extra[4 + length :]
        if kind == _UNICODE_PATH_FIELD and length > 5 and field[1:5] == struct.pack("<I", zlib.crc32(raw_name)):
            return field[5:].decode()
    return ""


def _stated_entries(file: BinaryIO) -> int | None:
    """Read the number of members from the end record of a zip; None if the record does not state it."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - _MAX_END_RECORD_BYTES))
    tail = file.read()
    end = tail.rfind(b"PK\5\6")
    if end < 0 or end + 12 > len(tail):
        return None
    (entries,) = struct.unpack_from("<H", tail, end + 10)
    zip64 = end - _ZIP64_RECORDS_BYTES
    if zip64 >= 0 and tail[zip64 : zip64 + 4] == b"PK\6\6":
        (entries,) = struct.unpack_from("<Q", tail, zip64 + 32)
    return None if entries in (0xFFFF, 0xFFFF_FFFF_FFFF_FFFF) else int(entries)


class TarSource:
    """Source of the members of a tar. Without `decompressed`, a compressed one must be read by ascending location."""

    messages: Sequence[str] = ()

    def __init__(self, path: Path, decompressed: Path | None = None):
        self.path = path
        opener = decompressor(path)
        self._file: BinaryIO = opener(path, "rb") if opener and not decompressed else (decompressed or path).open("rb")

    def members(self) -> Iterator[Member]:
        self._file.seek(0)
        end = 0  # offset of the last member's contents
        try:
            with tarfile.open(fileobj=self._file, mode="r:", tarinfo=_StrictHeader) as tar:
                while (info := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # else tarfile keeps all headers in memory
                    if info.size < 0 or info.offset_data <= end:
                        raise tarfile.ReadError(f"the header of {printable(info.name)} points backwards")
                    end = info.offset_data
                    name = _normalize(info.name)
                    if info.isdir() or _hidden(name):
                        continue
                    problem = _name_problem(name) or _size_problem(info.size)
                    if not info.isreg() or info.issparse():
                        problem = "a link or a device"
                    yield Member(name, info.offset_data, info.size, problem)
                while self._file.read(1 << 20):  # a compressed file is checked against its checksum at its end
                    pass
        except (tarfile.TarError, ValueError, *READ_ERRORS) as error:
            if not end:
                raise _not_an_archive(self.path) from None
            raise damaged_tar(self.path, error) from None

    def read(self, member: Member) -> bytes:
        data = self.read_start(member, member.size)
        if len(data) != member.size:
            raise UnreadableFile("the tar is truncated")
        return data

    def read_start(self, member: Member, size: int) -> bytes:
        try:
            self._file.seek(member.location)
            return self._file.read(min(size, member.size))
        except READ_ERRORS as error:
            raise UnreadableFile(f"cannot be read from the tar: {error}") from None


_EXTENSION_TYPES = (  # headers whose contents tarfile reads into memory
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


class _StrictHeader(tarfile.TarInfo):
    """Tar header that raises where tarfile would end the archive silently, loop, or exhaust the memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        if not buf:
            raise tarfile.ReadError("it has no end marker")
        try:
            info = super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the end marker
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None
        too_long = info.type in _EXTENSION_TYPES and info.size > _MAX_TAR_HEADER_BYTES
        if info.size < 0 or too_long or info.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError(f"unsupported header of type {info.type!r} and {info.size} bytes")
        return info
