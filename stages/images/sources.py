"""Where image files lie: a folder, a zip or a tar, read in place.

Nothing is unpacked: members are listed by name and read into memory one at a time, each no longer than
LARGEST_FILE. So a member called ../x is only an odd name, links and devices are passed over, and a bomb costs no
more than its first LARGEST_FILE bytes. Names keep any bytes they have (surrogateescape).
"""

import bz2
import gzip
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol, Self

from stages.errors import UserError

LARGEST_FILE = 1 << 28  # bytes
_LARGEST_HEADER = 1 << 20  # bytes of a tar's long names; a real one has a few hundred
_HIDDEN = ("__MACOSX", "Thumbs.db", "desktop.ini")


class Member(NamedTuple):
    """One file of a source."""

    name: str  # relative, parts joined by /
    location: int  # what the source finds it by
    size: int  # bytes
    problem: str = ""  # why it must not be read


class UnreadableFile(Exception):
    """One file of a source cannot be read; the message says why."""


class Source(Protocol):
    """Files by name."""

    def members(self) -> Iterator[Member]:
        """List every file that is not hidden."""

    def read(self, member: Member) -> bytes:
        """Read one file; raise UnreadableFile if it is not what was listed."""


def open_source(path: Path) -> Source:
    """Open a folder, a zip or a tar, plain or compressed."""
    if not path.exists():
        raise UserError("The source of images does not exist.", where=path, fix=_SET_SOURCE, code=2)
    if path.is_dir():
        return FolderSource(path)
    if not path.is_file():
        raise _not_an_archive(path)
    with path.open("rb") as file:
        start = file.read(4)
    return ZipSource(path) if start[:2] == b"PK" else TarSource(path)


def printable(name: str) -> str:
    """Make a name safe to print: control characters and bytes that are no UTF-8 are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in name)


_SET_SOURCE = "Set dataset.source to a folder, a zip or a tar of images."


def _not_an_archive(path: Path) -> UserError:
    return UserError("The source of images is a file, but no zip or tar.", where=path, fix=_SET_SOURCE, code=2)


def _hidden(name: str) -> bool:
    return any(part.startswith(".") or part in _HIDDEN for part in name.split("/") if part not in (".", ".."))


def _problem(size: int) -> str:
    return f"{size} bytes is more than {LARGEST_FILE}" if size > LARGEST_FILE else ""


class FolderSource:
    """Files under a folder. Links to files are followed; a link to a folder is refused, as DVC sees nothing in it."""

    def __init__(self, path: Path):
        self.path = path

    def members(self) -> Iterator[Member]:
        yield from self._walk("")

    def _walk(self, prefix: str) -> Iterator[Member]:
        here = self.path / prefix
        try:
            names = sorted(path.name for path in here.iterdir())
        except OSError as error:
            yield Member(prefix, 0, 0, error.strerror or "cannot be read")
            return
        folders = []
        for name in (name for name in names if not _hidden(name)):
            path = f"{prefix}{name}"
            try:
                found = (self.path / path).stat()
            except OSError as error:  # a link to nothing, or to itself
                yield Member(path, 0, 0, error.strerror or "cannot be read")
                continue
            if stat.S_ISDIR(found.st_mode):
                if (self.path / path).is_symlink():
                    raise UserError(
                        "This is a link to a folder: DVC does not see what is in it, and so no change there.",
                        where=self.path / path,
                        fix="Put the folder itself in its place, or hard links to its files: cp -rlL.",
                        code=4,
                    )
                folders.append(path)
            elif stat.S_ISREG(found.st_mode):
                yield Member(path, 0, found.st_size, _problem(found.st_size))
            else:
                yield Member(path, 0, 0, "not a regular file")
        for path in folders:
            yield from self._walk(f"{path}/")

    def read(self, member: Member) -> bytes:
        try:
            with (self.path / member.name).open("rb") as file:
                data = file.read(member.size + 1)
        except OSError as error:
            raise UnreadableFile(f"cannot be read: {error.strerror}") from None
        if len(data) != member.size:
            raise UnreadableFile("changed while the images were read")
        return data


class ZipSource:
    """Members of a zip."""

    def __init__(self, path: Path):
        try:
            self._zip = zipfile.ZipFile(path)
            self._infos = self._zip.infolist()
            with path.open("rb") as file:
                stated = zipfile._EndRecData(file)[zipfile._ECD_ENTRIES_TOTAL]  # type: ignore[attr-defined]
            # Where a length in the list is wrong, an entry swallows those behind it. Some programs count to 2**16 only.
            if (len(self._infos) - stated) % 65_536:
                raise zipfile.BadZipFile(f"it lists {len(self._infos)} files, not {stated}")
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise UserError(
                f"The zip cannot be read: {error}.", where=path, fix="Make or copy it anew.", code=4
            ) from None

    def members(self) -> Iterator[Member]:
        for location, info in enumerate(self._infos):
            name = info.filename
            if not info.flag_bits & 0x800:  # not declared as UTF-8: Python took the bytes for code page 437
                name = name.encode("cp437").decode("utf-8", "surrogateescape")
            if info.create_system == 0 and "/" not in name:  # some Windows programs write backslashes
                name = name.replace("\\", "/")
            kind = stat.S_IFMT(info.external_attr >> 16)
            if info.is_dir() or _hidden(name):
                continue
            problem = _unsafe(name) or _problem(info.file_size)
            if kind not in (0, stat.S_IFREG):
                problem = "a link or a device"
            elif info.flag_bits & 1:
                problem = "encrypted"
            yield Member(name, location, info.file_size, problem)

    def read(self, member: Member) -> bytes:
        try:
            with self._zip.open(self._infos[member.location]) as file:
                data = file.read(member.size)
        except Exception as error:  # of zipfile, zlib, lzma and bz2, each with its own kinds
            raise UnreadableFile(f"cannot be read from the zip: {error or type(error).__name__}") from None
        if len(data) != member.size:
            raise UnreadableFile("shorter than the zip says")
        return data


class TarSource:
    """Members of a tar; read in the order of their locations, even a compressed one is decompressed once."""

    def __init__(self, path: Path):
        self.path = path
        with path.open("rb") as file:
            start = file.read(6)
        opener = next((opener for magic, opener in _COMPRESSIONS.items() if start.startswith(magic)), open)
        self._file: BinaryIO = opener(path, "rb")  # type: ignore[operator]

    def members(self) -> Iterator[Member]:
        self._file.seek(0)
        end = 0
        try:
            with tarfile.open(fileobj=self._file, mode="r:", tarinfo=_StrictHeader) as tar:
                while (info := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # else it keeps all headers in memory
                    if info.size < 0 or info.offset_data <= end:
                        raise tarfile.ReadError(f"the header of {printable(info.name)} points backwards")
                    end = info.offset_data
                    name = info.name.removeprefix("./")
                    if info.isdir() or _hidden(name):
                        continue
                    problem = _unsafe(name) or _problem(info.size)
                    if not info.isreg() or info.issparse():
                        problem = "a link or a device"
                    yield Member(name, info.offset_data, info.size, problem)
                while self._file.read(1 << 20):  # a compressed file is held against its checksum where it ends
                    pass
        except (tarfile.TarError, ValueError, *_UNREADABLE) as error:
            if not end:
                raise _not_an_archive(self.path) from None
            raise UserError(
                f"The tar is damaged or cut short: {error}.", where=self.path, fix="Make or copy it anew.", code=4
            ) from None

    def read(self, member: Member) -> bytes:
        try:
            self._file.seek(member.location)
            data = self._file.read(member.size)
        except _UNREADABLE as error:
            raise UnreadableFile(f"cannot be read from the tar: {error}") from None
        if len(data) != member.size:
            raise UnreadableFile("the tar ends before it")
        return data


_COMPRESSIONS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
_UNREADABLE = (EOFError, OSError, zlib.error, lzma.LZMAError)


_EXTENSIONS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


class _StrictHeader(tarfile.TarInfo):
    """A header that stops the reading where tarfile would end it quietly, loop, or fill the memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        if not buf:
            raise tarfile.ReadError("it ends without its end mark")
        try:
            info = super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the end mark
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None
        extends = info.type in _EXTENSIONS  # tarfile reads their contents into memory
        if info.size < 0 or (extends and info.size > _LARGEST_HEADER) or info.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError(f"a header of type {info.type!r} and {info.size} bytes")
        return info


def _unsafe(name: str) -> str:
    return "the name leads out of the archive" if name.startswith("/") or ".." in name.split("/") else ""
