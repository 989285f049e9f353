"""Listing of a source: its images with their splits and classes, read from names without decoding anything.

Splits and classes come from folder names (layout.py) or from a CSV inside the source (labels_table.py), so that DVC
tracks them. Images are ordered by a hash of their names, which is independent of the disk and mixes the classes.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from stages.errors import UserError
from stages.images import labels_table
from stages.images.count import format_count
from stages.images.layout import RENAME_TO_UTF8, Candidate, is_utf8, read_folders
from stages.images.sources import Member, Source, TarSource, UnreadableFile, open_source, printable

SPLITS = ("train", "validation", "test")
_EXPECTED_LAYOUT = "Use class folders of images (cat/1.png), with or without train/ and validation/ above them."
_IMAGE_SUFFIXES = frozenset({  # also of unsupported formats, which are then rejected by name instead of ignored
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff",
    ".eps", ".psd", ".svg", ".heic", ".heif", ".avif", ".pdf", ".ico", ".jp2", ".ppm", ".pgm", ".tga",
})  # fmt: skip
_TABLE_SUFFIXES = (".csv", ".tsv")
_MAX_UNUSED_TABLE_BYTES = 1 << 24  # of a table that is only looked at, to mention that it lists classes
_SHOWN_SUFFIXES = 5  # in the message about files that are not images
_SHOWN_REASONS = 5  # in the messages about skipped images
_SHOWN_CLASSES = 10  # in the message about classes without a training image
_MAX_CLASS_NAME_LENGTH = 255  # as of a folder
_SHOWN_CHARACTERS = 40  # of a long class name
_SHOWN_TABLES = 3  # in the error about a missing table
CHECKED_FILES = 20_000  # that `check_source` lists in a fraction of a second
# First bytes of a tar, in which `check_source` looks for an image; decompressing them takes a second or two.
_CHECKED_BYTES = 1 << 27


class ListedImage(NamedTuple):
    """One image file of a source, with its split and class."""

    member: Member
    split: str
    label: int  # index into the classes; -1: none


class Listing(NamedTuple):
    """Images and classes of a source."""

    images: tuple[ListedImage, ...]  # grouped by split, ordered by a hash of the names
    classes: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]  # image files that are not used: name, reason
    messages: tuple[str, ...]  # assumptions to show to the user
    doubts: tuple[str, ...]  # assumptions that may be wrong


def list_images(path: Path, labels: str, *, validation_fraction: float, decompressed: Path | None = None) -> Listing:
    """List the images of a folder, zip or tar. `labels` and `validation_fraction` are as in DatasetConfig.

    `decompressed` is the result of `compressed_tar.decompress`. Raises UserError if there are no (training) images, or
    if the folders or the labels CSV are inconsistent.
    """
    source = open_source(path, decompressed)
    return _list(source, list(source.members()), path, labels, validation_fraction)


def check_source(path: Path, labels: str) -> None:
    """Raise UserError if a source is missing, has no images, or has inconsistent folders or labels.

    Of a tar, and of a source with more than CHECKED_FILES files, only the first files and the header of the labels are
    checked, so that the check takes seconds.
    """
    source = open_source(path)
    if not isinstance(source, TarSource):
        members = list(islice(source.members(), CHECKED_FILES + 1))
        if path.is_dir():
            _check_utf8(members, path)
        if len(members) <= CHECKED_FILES:
            _list(source, members, path, labels, validation_fraction=0.0)
            return
    problems = []
    for number, member in enumerate(source.members(), start=1):
        if member.problem:
            problems.append((member.name, member.problem))
        elif is_image(member.name):
            break
        # To reach the next header, a compressed tar has to be decompressed up to this offset. In a folder or a zip the
        # location is not an offset, and only a file larger than the bound ends the search early.
        if number >= CHECKED_FILES or member.location + member.size > _CHECKED_BYTES:
            break
    else:
        raise _no_images(path, problems)
    if labels in ("folders", "none") or isinstance(source, TarSource):
        return
    name = _table_name(path, labels)
    if name.startswith(("/", "../")):
        raise _no_table(path, labels, ())
    if path.is_dir():
        data = b""
        with suppress(OSError, ValueError):  # not a file, or a name that no file may have
            data = (path / name).read_bytes()
    else:
        data = next((_read(source, member, name) for member in source.members() if member.name == name), b"")
    if data:  # otherwise each split folder may have a table of this name
        labels_table.read_table(data, path / name)


def _check_utf8(members: Iterable[Member], path: Path) -> None:
    """Raise UserError if a name in a folder is not UTF-8: DVC cannot hash it. Archives may have such names."""
    for member in members:
        if not is_utf8(member.name):
            raise UserError(
                f"The name of a file is not UTF-8, so DVC cannot track it: {printable(member.name)}.",
                where=path,
                fix=RENAME_TO_UTF8,
                code=4,
            )


def is_image(name: str) -> bool:
    """Return whether a file is named like an image, also of a format that is not supported."""
    return PurePosixPath(name).suffix.lower() in _IMAGE_SUFFIXES


def _list(source: Source, members: list[Member], path: Path, labels: str, validation_fraction: float) -> Listing:
    skipped = [(member.name, member.problem) for member in members if member.problem]
    readable = [member for member in members if not member.problem]
    image_files = [member for member in readable if is_image(member.name)]
    if not image_files:
        raise _no_images(path, skipped)
    tables = [] if labels in ("folders", "none") else _find_tables(readable, path, labels)
    messages, doubts = list(source.messages), []
    if others := [member for member in readable if not is_image(member.name) and member not in tables]:
        messages.append(_count_suffixes(others))
    if labels in ("folders", "none"):
        layout = read_folders(image_files, labels == "folders", path)
        candidates = layout.candidates
        skipped += layout.skipped
        messages += layout.messages
        doubts += layout.doubts
        if labels == "folders":
            doubts += unused_tables(source, readable)
    else:
        candidates = _from_tables(source, tables, image_files, path, messages)
    messages += _skipped_files(skipped)
    classes = sorted({candidate.label for candidate in candidates if candidate.label is not None})
    _check_lengths(classes, path)
    if len(classes) == 1:
        messages.append(f"All images have one class, {printable(classes[0])}.")
    class_index = {name: index for index, name in enumerate(classes)}
    images = [
        ListedImage(candidate.member, split, class_index[candidate.label] if candidate.label is not None else -1)
        for candidate, split in _assign_splits(sorted(candidates, key=_name_hash), validation_fraction, path, messages)
    ]
    untrained = sorted(set(range(len(classes))) - {image.label for image in images if image.split == "train"})
    if untrained:
        names = ", ".join(printable(classes[label]) for label in untrained[:_SHOWN_CLASSES])
        doubts.append(f"Classes without a training image: {names}.")
    images.sort(key=lambda image: SPLITS.index(image.split))  # stable: the hash order within a split stays
    return Listing(tuple(images), tuple(classes), tuple(skipped), tuple(messages), tuple(doubts))


def _check_lengths(classes: Iterable[str], path: Path) -> None:
    """Raise UserError if the name of a class is too long for a name, such as a caption in the column of classes."""
    for name in classes:
        if len(name) > _MAX_CLASS_NAME_LENGTH:
            raise UserError(
                f"A class name must have at most {_MAX_CLASS_NAME_LENGTH} characters, got {len(name)}: "
                f"{printable(name[:_SHOWN_CHARACTERS])}...",
                where=path,
                fix="Use short names of classes, such as cat, in the labels or the names of folders.",
                code=4,
            )


def _name_hash(candidate: Candidate) -> tuple[bytes, int]:
    """Return the sort key of an image. The location separates members of one name, which a zip may have."""
    name = candidate.member.name.encode("utf-8", "surrogateescape")
    return hashlib.sha256(name).digest(), candidate.member.location


def _no_images(path: Path, skipped: list[tuple[str, str]]) -> UserError:
    reason = ""
    if skipped:
        name, problem = skipped[0]
        reason = f" The first of {len(skipped)} unusable files: {printable(name)}: {problem}."
    return UserError(f"The source has no images.{reason}", where=path, fix=_EXPECTED_LAYOUT, code=2)


def _count_suffixes(others: list[Member]) -> str:
    """Count the files that are not images, by suffix."""
    suffixes = Counter(PurePosixPath(member.name).suffix.lower() or "no suffix" for member in others)
    counts = ", ".join(f"{printable(suffix)} {count}" for suffix, count in suffixes.most_common(_SHOWN_SUFFIXES))
    files = format_count(suffixes.total(), "file that is not an image is", "files that are not images are")
    return f"{files} ignored: {counts}."


def _skipped_files(skipped: list[tuple[str, str]]) -> list[str]:
    reasons = Counter(reason for _, reason in skipped).most_common()
    messages = [
        f"{format_count(count, 'image is', 'images are')} skipped: {printable(reason)}."
        for reason, count in reasons[:_SHOWN_REASONS]
    ]
    if others := sum(count for _, count in reasons[_SHOWN_REASONS:]):
        messages.append(f"{format_count(others, 'image is', 'images are')} skipped for other reasons.")
    return messages


def unused_tables(source: Source, readable: list[Member]) -> list[str]:
    """Mention a table that lists classes although classes come from folders. Tables in subfolders are not read."""
    doubts = []
    for member in readable:
        is_table = "/" not in member.name and member.name.lower().endswith(_TABLE_SUFFIXES)
        if not is_table or member.size > _MAX_UNUSED_TABLE_BYTES:
            continue
        with suppress(UnreadableFile):
            if labels_table.has_columns(source.read(member)):
                name = printable(member.name)
                doubts.append(f"{name} lists classes and is not used. To use it: -S dataset.labels={name}")
    return doubts


def _find_tables(readable: list[Member], path: Path, labels: str) -> list[Member]:
    """Return the CSV of labels, or one CSV of this name in each split folder. Raises UserError if there is none."""
    name = _table_name(path, labels)
    tables = [member for member in readable if member.name == name]
    if not tables and "/" not in name:
        tables = sorted(member for member in readable if PurePosixPath(member.name).name == name)
    if not tables:
        suggested = [member.name for member in readable if member.name.lower().endswith(_TABLE_SUFFIXES)]
        raise _no_table(path, labels, suggested)
    return tables


def _from_tables(
    source: Source, tables: list[Member], image_files: list[Member], path: Path, messages: list[str]
) -> list[Candidate]:
    """Read splits and classes from CSV files."""
    index = labels_table.ImageIndex(image_files, path)
    matched: dict[Member, labels_table.Row] = {}
    table_messages: list[str] = []
    for member in tables:
        where = path / member.name
        content = labels_table.read_table(_read(source, member, where), where)
        folder = member.name.rpartition("/")[0]
        matched |= labels_table.match_rows(content, index, folder, where)
        table_messages += content.messages
    messages += dict.fromkeys(table_messages)
    if index.short_names_used:
        rows = format_count(index.short_names_used, "row of the labels names its", "rows of the labels name their")
        messages.append(f"{rows} image without its folder or suffix.")
    if unlisted := len(image_files) - len(matched):
        images = format_count(
            unlisted, "image that the labels do not list is", "images that the labels do not list are"
        )
        messages.append(f"{images} ignored.")
    return labels_table.to_candidates(matched, messages)


def _read(source: Source, member: Member, where: object) -> bytes:
    try:
        return source.read(member)
    except UnreadableFile as error:
        raise UserError(
            f"The labels cannot be read: {error}.", where=where, fix="Run the same command again.", code=4
        ) from None


def _table_name(path: Path, labels: str) -> str:
    """Return the CSV's name inside the source. `labels` may include the path of the source."""
    name = Path(labels)
    return (name.relative_to(path) if name.is_relative_to(path) else name).as_posix()


def _no_table(path: Path, labels: str, tables: Iterable[str]) -> UserError:
    names = ", ".join(printable(name) for name in islice(tables, _SHOWN_TABLES))
    fix = f"Set dataset.labels to a CSV of the source: {names}"
    if not names:
        fix = f"Move the CSV into the source, where DVC tracks its changes. {labels_table.EXPECTED_COLUMNS}."
    return UserError(
        f"dataset.labels must be folders, none, or a CSV inside the source, got {labels!r}.",
        where=path,
        fix=fix,
        code=2,
    )


def _assign_splits(
    candidates: Iterable[Candidate], validation_fraction: float, path: Path, messages: list[str]
) -> list[tuple[Candidate, str]]:
    """Assign a split to each image. Without validation images in the source, hold out the first training images."""
    assigned = [(candidate, candidate.split or "train") for candidate in candidates]
    train = [position for position, (_, split) in enumerate(assigned) if split == "train"]
    if not train:
        splits = " and ".join(sorted({split for _, split in assigned}))
        raise UserError(
            f"The source has no training images, only {splits} images.", where=path, fix=_EXPECTED_LAYOUT, code=4
        )
    if validation_fraction and not any(split == "validation" for _, split in assigned):
        if len(train) == 1:
            messages.append("The source has a single training image and no validation images: none can be held out.")
            return assigned
        held_out = min(max(1, round(len(train) * validation_fraction)), len(train) - 1)
        for position in train[:held_out]:
            assigned[position] = assigned[position][0], "validation"
        messages.append(f"The source has no validation images: {held_out} of {len(train)} images are held out.")
    return assigned
