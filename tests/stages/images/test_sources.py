"""Tests of sources: valid, damaged and malicious folders, zips and tars, read in place."""

import io
import os
import shutil
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from stages.errors import UserError
from stages.images import compressed_tar, sources
from stages.images.compressed_tar import _copy, decompress
from stages.images.sources import UnreadableFile, open_source, printable

FILES = {
    "cat/1.png": b"one",
    "cat/a.v1.jpg": b"two",
    "cat/-x \"y'\n.png": b"three",
    "dog/\u00e9.png": b"composed",
    "dog/e\u0301.png": b"decomposed",
    "dog/\u05d0\u202e\U0001f600.png": b"right to left",
    "dog/\udcff\udcfe.png": b"no UTF-8",
    "dog/" + "n" * 251 + ".png": b"255 bytes",
    "dog/A.png": b"upper",
    "dog/a.png": b"lower",
}
HIDDEN = {"cat/.hidden.png": b"x", "__MACOSX/cat/._1.png": b"x", "cat/Thumbs.db": b"x", ".git/a.png": b"x"}


def folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode, format=tarfile.PAX_FORMAT) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def zip_(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def contents(path: Path) -> dict[str, bytes]:
    source = open_source(path)
    return {member.name: source.read(member) for member in source.members() if not member.problem}


def problems(path: Path) -> dict[str, str]:
    return {member.name: member.problem for member in open_source(path).members() if member.problem}


def test_a_folder_may_have_file_names_of_any_bytes(tmp_path):
    """Newlines, quotes, right-to-left, NFC beside NFD, 255 bytes, invalid UTF-8; hidden files are skipped."""
    assert contents(folder(tmp_path / "f", FILES | HIDDEN)) == FILES


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_a_tar_may_have_member_names_of_any_bytes(tmp_path, mode):
    """Plain and compressed tars give the same names."""
    assert contents(tar(tmp_path / "a.tar", FILES | HIDDEN, mode)) == FILES


def test_a_zip_may_have_any_names(tmp_path):
    """Names that are declared UTF-8 are unchanged; two members of one name stay separate."""
    names = {name: data for name, data in FILES.items() if "\udcff" not in name}
    assert contents(zip_(tmp_path / "a.zip", names | HIDDEN)) == names
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive, pytest.warns(UserWarning):
        archive.writestr("a.png", b"first")
        archive.writestr("a.png", b"second")
    source = open_source(tmp_path / "c.zip")
    assert [source.read(member) for member in source.members()] == [b"first", b"second"]


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_names_in_archives_are_normalized(tmp_path, kind):
    """As a file system does; names that lead outside are still rejected."""
    make = {"zip": zip_, "tar": tar}[kind]
    names = ("./cat/1.png", "cat//2.png", ".//cat/./3.png", "./.hidden/4.png")
    assert set(contents(make(tmp_path / "a", dict.fromkeys(names, b"x")))) == {f"cat/{n}.png" for n in (1, 2, 3)}
    outside = ("//x.png", "./../x.png", "cat/..//x.png")
    rejected = problems(make(tmp_path / "b", dict.fromkeys(outside, b"x")))
    assert rejected == dict.fromkeys(("/x.png", "../x.png", "cat/../x.png"), "the name leads outside the archive")


def test_legacy_names_in_a_zip_are_decoded_as_zipfile_does(tmp_path):
    """Without the UTF-8 flag, bytes that are not UTF-8 are code page 437, with a message. macOS omits the flag."""
    raw = zip_(tmp_path / "a.zip", {"MQQller/1.png": b"x"})
    legacy = raw.read_bytes().replace(b"MQQller", b"M\x81\x94ller")
    raw.write_bytes(legacy)
    source = open_source(raw)
    assert [member.name for member in source.members()] == ["Müöller/1.png"] == zipfile.ZipFile(raw).namelist()
    assert source.messages == ["1 names in the zip are not UTF-8 and are read as code page 437, such as Müöller/1.png."]
    assert contents(raw) == {"Müöller/1.png": b"x"}
    raw.write_bytes(legacy.replace(b"M\x81\x94ller", "Müller".encode()))
    source = open_source(raw)
    assert [member.name for member in source.members()] == ["Müller/1.png"] and not source.messages


@pytest.mark.parametrize(("checksum", "name"), [(0, "Müller.png"), (1, "Mⁿller.png")])
def test_the_unicode_name_of_a_zip_is_preferred(tmp_path, checksum, name):
    """Info-ZIP writes it in an extra field, which counts only if its checksum is that of the other name."""
    legacy = b"M\xfcller.png"
    info = zipfile.ZipInfo("MQller.png")
    field = b"\1" + struct.pack("<I", zlib.crc32(legacy) ^ checksum) + "Müller.png".encode()
    info.extra = struct.pack("<HH", 0x7075, len(field)) + field
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(info, b"x")
    (tmp_path / "a.zip").write_bytes((tmp_path / "a.zip").read_bytes().replace(b"MQller.png", legacy))
    assert contents(tmp_path / "a.zip") == {name: b"x"}


def test_links_to_files_are_followed(tmp_path):
    """A dangling link, a link to itself and a pipe are reported as problems."""
    path = folder(tmp_path / "f", {"cat/1.png": b"one"})
    (path / "cat" / "link.png").symlink_to("1.png")
    (path / "cat" / "self.png").symlink_to("self.png")
    (path / "cat" / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(path / "cat" / "pipe.png")
    assert contents(path) == {"cat/1.png": b"one", "cat/link.png": b"one"}
    assert problems(path).keys() == {"cat/self.png", "cat/gone.png", "cat/pipe.png"}
    assert problems(path)["cat/pipe.png"] == "not a regular file"


@pytest.mark.parametrize("target", ["other", "source"])
def test_a_link_to_a_folder_is_rejected(tmp_path, target):
    """DVC, which decides whether the stage runs again, does not track the files behind it."""
    path = folder(tmp_path / "source", {"cat/1.png": b"one"})
    folder(tmp_path / "other", {"2.png": b"two"})
    (path / "dog").symlink_to(tmp_path / target)
    with pytest.raises(UserError, match="a link to a folder, whose changes DVC does not track") as caught:
        contents(path)
    assert caught.value.where == str(path / "dog") and "cp -rlL" in caught.value.fix


def test_a_file_that_changes_after_listing_is_unreadable(tmp_path):
    """A changed and a deleted file each give a reason."""
    path = folder(tmp_path / "f", {"a.png": b"one", "b.png": b"two"})
    source = open_source(path)
    first, second = source.members()
    (path / "a.png").write_bytes(b"longer")
    (path / "b.png").unlink()
    with pytest.raises(UnreadableFile, match="changed"):
        source.read(first)
    with pytest.raises(UnreadableFile, match="No such file"):
        source.read(second)


def test_members_outside_the_archive_are_rejected(tmp_path):
    """Names with .., absolute names, links and devices are reported; nothing is written."""
    archive_path = tmp_path / "evil.tar"
    with tarfile.open(archive_path, "w") as archive:
        for name, kind in {
            "../x.png": tarfile.REGTYPE,
            "/etc/x.png": tarfile.REGTYPE,
            "a/../../x.png": tarfile.REGTYPE,
            "link.png": tarfile.SYMTYPE,
            "hard.png": tarfile.LNKTYPE,
            "device.png": tarfile.CHRTYPE,
        }.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    assert contents(archive_path) == {}
    out, link = "the name leads outside the archive", "a link or a device"
    assert problems(archive_path) == {
        **dict.fromkeys(("../x.png", "/etc/x.png", "a/../../x.png"), out),
        **dict.fromkeys(("link.png", "hard.png", "device.png"), link),
    }
    assert set(problems(zip_(tmp_path / "evil.zip", {"../x.png": b"", "/x.png": b""}))) == {"../x.png", "/x.png"}
    link = zipfile.ZipInfo("link.png")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    assert problems(tmp_path / "link.zip") == {"link.png": "a link or a device"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.tar", "evil.zip", "link.zip"]


@pytest.mark.parametrize("kind", ["zip", "tar", "folder"])
def test_a_member_above_the_size_limit_is_rejected(tmp_path, monkeypatch, kind):
    """A member longer than MAX_FILE_BYTES is never read."""
    monkeypatch.setattr(sources, "MAX_FILE_BYTES", 1000)
    make = {"zip": zip_, "tar": tar, "folder": folder}[kind]
    path = make(tmp_path / "source", {"bomb.png": bytes(1001), "fine.png": bytes(1000)})
    assert contents(path).keys() == {"fine.png"}
    assert "1001 bytes" in problems(path)["bomb.png"]


def test_a_zip_with_a_wrong_size_reads_only_that_size(tmp_path):
    """20 MB behind a stated size of 10 bytes raises an error and allocates little memory."""
    path = zip_(tmp_path / "a.zip", {"bomb.png": bytes(20_000_000)})
    path.write_bytes(path.read_bytes().replace(struct.pack("<I", 20_000_000), struct.pack("<I", 10)))
    source = open_source(path)
    (member,) = source.members()
    tracemalloc.start()
    with pytest.raises(UnreadableFile, match=r"cannot be read from the zip: |shorter than the zip states"):
        source.read(member)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


def test_an_encrypted_member_is_reported(tmp_path):
    """There is no prompt for a password."""
    path = zip_(tmp_path / "a.zip", {"a.png": b"x"})
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(data)
    assert problems(path) == {"a.png": "encrypted"}


def _header(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = size
    header[156:157] = kind
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.timeout(20)
def test_a_tar_with_a_negative_size_is_rejected(tmp_path):
    """It would be read in an endless loop."""
    member = _header("a.png", b"%011o\0" % 3) + b"one".ljust(512, b"\0")
    negative = b"\xff" * 10 + (-512 & 0xFFFF).to_bytes(2, "big")
    path = tmp_path / "a.tar"
    for kind in (b"0", b"x", b"L"):
        path.write_bytes(member + _header("b.png", negative, kind) + bytes(1024))
        with pytest.raises(UserError, match="damaged"):
            list(open_source(path).members())
    record = b"14 size=-1024\n"
    extended = _header("p", b"%011o\0" % len(record), b"x") + record.ljust(512, b"\0")
    path.write_bytes(member + extended + _header("b.png", b"%011o\0" % 0) + bytes(1024))
    with pytest.raises(UserError, match="damaged"):
        list(open_source(path).members())


def test_a_tar_with_a_too_long_name_is_rejected(tmp_path):
    """tarfile would read the name into memory."""
    path = tmp_path / "a.tar"
    member = _header("a.png", b"%011o\0" % 0)
    path.write_bytes(member + _header("b.png", b"%011o\0" % (1 << 30), b"L") + bytes(1024))
    with pytest.raises(UserError, match="damaged"):
        list(open_source(path).members())


def test_a_truncated_or_damaged_tar_is_rejected(tmp_path):
    """A cut between two members, or a damaged header, raises instead of ending the listing."""
    path = tar(tmp_path / "a.tar", {f"{number}.png": bytes(100) for number in range(5)})
    complete = path.read_bytes()
    for length in (1024 * 2, 1024 * 3 + 512, 1024 * 3 + 100):
        path.write_bytes(complete[:length])
        with pytest.raises(UserError, match="damaged or truncated"):
            list(open_source(path).members())
    flipped = bytearray(complete)
    flipped[1024 * 2 + 150] ^= 4
    path.write_bytes(flipped)
    with pytest.raises(UserError, match="damaged or truncated"):
        list(open_source(path).members())
    path = tar(tmp_path / "a.tgz", {"a.png": os.urandom(5000), "b.png": os.urandom(5000)}, "w:gz")
    path.write_bytes(path.read_bytes()[:7000])
    with pytest.raises(UserError, match="damaged or truncated"):
        list(open_source(path).members())


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_every_flipped_bit_in_a_compressed_tar_is_detected(tmp_path, mode):
    """This includes bits that fake the end of the tar or change pixels."""
    generator = np.random.default_rng(0)
    words = [b"".join(b"word%d " % word for word in generator.integers(0, 99, 3000)) for _ in range(4)]
    complete = tar(tmp_path / "a.tar", {f"{number}.bmp": data for number, data in enumerate(words)}, mode).read_bytes()
    body = range(10, len(complete))  # before it, gzip notes the time, which may be any
    for position, bit in zip(generator.choice(body, 60), generator.integers(0, 8, 60), strict=True):
        damaged = bytearray(complete)
        damaged[position] ^= 1 << int(bit)
        (tmp_path / "a.tar").write_bytes(damaged)
        with pytest.raises(UserError, match=r"damaged or truncated|not a folder, a zip or a tar"):
            list(open_source(tmp_path / "a.tar").members())


def test_a_compressed_tar_is_read_from_its_decompressed_file(tmp_path):
    """Members and contents are equal; the file is made once, and other sources have none."""
    path = tar(tmp_path / "a.tgz", {"a.png": b"some", "b.png": b"others"}, "w:gz")
    messages: list[str] = []
    decompressed = decompress(path, tmp_path / "work/a.tar", messages.append)
    assert decompressed == decompress(path, tmp_path / "work/a.tar", messages.append) and len(messages) == 1
    source, members = open_source(path, decompressed), list(open_source(path).members())
    assert list(source.members()) == members
    assert [source.read(member) for member in reversed(members)] == [b"others", b"some"]
    for other in (tmp_path, tmp_path / "absent", tar(tmp_path / "b.tar", {"a.png": b"one"})):
        assert decompress(other, tmp_path / "none", messages.append) is None


def test_a_tar_that_cannot_be_decompressed_is_rejected(tmp_path):
    """Damage and a full disk are errors with a fix; no partial file is left."""
    path = tar(tmp_path / "a.tgz", {"a.png": os.urandom(5000)}, "w:gz")
    with (
        Path("/dev/full").open("wb", buffering=0) as full,
        pytest.raises(UserError, match=r"a\.tgz cannot be decompressed: No space left on device, after 0") as caught,
    ):
        _copy(io.BytesIO(bytes(1 << 20)), full, path, tmp_path / "out.tar")
    assert str(path) in caught.value.fix
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match="damaged or truncated"):
        decompress(path, tmp_path / "out.tar", print)
    assert [file.name for file in tmp_path.iterdir()] == ["a.tgz"]


def test_decompression_stops_before_the_disk_is_full(tmp_path, monkeypatch):
    """A small tar can decompress to any size. Neither its partial file nor that of a killed process is left."""
    usage = shutil.disk_usage(tmp_path)

    def disk_usage(folder: Path):
        written = sum(file.stat().st_size for file in folder.glob(".*"))
        return usage._replace(free=compressed_tar.RESERVED_DISK_BYTES + (3 << 20) + (1 << 19) - written)

    monkeypatch.setattr(compressed_tar.shutil, "disk_usage", disk_usage)
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / ".out.tar.1").write_bytes(bytes(9 << 20))
    bomb = tar(tmp_path / "bomb.tgz", {"a.bmp": bytes(8 << 20)}, "w:gz")
    with pytest.raises(UserError) as caught:
        decompress(bomb, folder / "out.tar", lambda text: None)
    assert caught.value.what == (
        f"bomb.tgz cannot be decompressed: its disk would have less than {1 << 28} bytes left, after {3 << 20} bytes."
    )
    assert caught.value.where == str(folder) and str(bomb) in caught.value.fix and caught.value.code == 3
    assert not list(folder.iterdir())
    fits = tar(tmp_path / "fits.tgz", {"a.bmp": bytes(1 << 20)}, "w:gz")
    assert decompress(fits, folder / "out.tar", lambda text: None) == folder / "out.tar"


def test_damage_after_listing_makes_only_that_image_unreadable(tmp_path):
    """Workers do not list the tar again, so reading must detect the damage."""
    path = tar(tmp_path / "a.tgz", {"a.png": b"some words " * 5000, "b.png": b"others " * 5000}, "w:gz")
    member = list(open_source(path).members())[1]
    path.write_bytes(path.read_bytes()[:30] + b"\xff" * 300)
    with pytest.raises(UnreadableFile, match="cannot be read from the tar"):
        open_source(path).read(member)


def test_a_zip_whose_directory_hides_files_is_rejected(tmp_path):
    """A flipped bit makes a record's comment longer than all records behind it, which zipfile accepts."""
    path = zip_(tmp_path / "a.zip", {f"{number}.png": b"image" for number in range(9)})
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(b"PK\1\2") + 33] ^= 0x80  # the comment's length
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="it lists 1 files, not 9"):
        open_source(path)


def test_a_path_that_is_not_a_source_is_rejected(tmp_path):
    """The error names a missing path, a text file, an empty file and a broken zip."""
    text, empty, broken = tmp_path / "a.txt", tmp_path / "empty", tmp_path / "a.zip"
    text.write_text("hello")
    empty.write_bytes(b"")
    broken.write_bytes(b"PK\3\4 and no more")
    for path, message in [
        (tmp_path / "none", "does not exist"),
        (text, "not a folder, a zip or a tar"),
        (empty, "not a folder, a zip or a tar"),
        (broken, "zip is damaged"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            list(open_source(path).members())
        assert caught.value.where == str(path) and caught.value.fix


def test_printable_names_are_safe_on_a_terminal():
    """Control characters, direction marks and invalid bytes are escaped; letters of any script are not."""
    assert printable("caf\u00e9 \u05d0 \U0001f600") == "caf\u00e9 \u05d0 \U0001f600"
    assert printable("a\nb\x1b[31m\u202e\udcff") == r"a\nb\x1b[31m\u202e\udcff"


@pytest.mark.parametrize(
    ("path", "similar"), [("phots", "photos"), ("Photo/cat", "photos/cat"), ("photos/cot", "photos/cat")]
)
def test_missing_source_suggests_a_similar_path(tmp_path, monkeypatch, path, similar):
    """Relative to the current folder, as it was given."""
    monkeypatch.chdir(tmp_path)
    Path("photos/cat").mkdir(parents=True)
    with pytest.raises(UserError) as caught:
        open_source(Path(path))
    assert caught.value.fix == f"Did you mean {similar}?"
    with pytest.raises(UserError, match="Set dataset"):
        open_source(Path("elsewhere"))
