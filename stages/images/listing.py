"""Which images a source holds, and of which split and class each is: read from names, nothing is decoded.

    cat/1.png                        class folders
    train/cat/1.png  val/cat/2.png   split folders, of class folders or of images
    1.png                            images without labels
    labels.csv                       columns path,label and optionally split; inside the source, so that DVC sees it

Images are listed in the order of a hash of their names: the same whatever the disk says, and classes well mixed.
"""

import csv
import hashlib
import io
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from stages.errors import UserError
from stages.images.sources import Member, Source, UnreadableFile, open_source, printable

SPLITS = ("train", "validation", "test")
LAYOUT = "Class folders of images are expected (cat/1.png), with or without train/ and validation/ above them."
_SPLIT_FOLDERS = {
    "train": "train", "training": "train",
    "validation": "validation", "val": "validation", "valid": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
_PICTURES = frozenset({  # files that mean to be pictures; those of a format that is not allowed are rejected by name
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff",
    ".eps", ".psd", ".svg", ".heic", ".heif", ".avif", ".pdf", ".ico", ".jp2", ".ppm", ".pgm", ".tga",
})  # fmt: skip


class Entry(NamedTuple):
    """One image to be."""

    member: Member
    split: str
    label: int  # index into the classes; -1: none


class Listing(NamedTuple):
    """What a source holds."""

    entries: tuple[Entry, ...]  # split by split, mixed by a hash of the names
    classes: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]  # name, reason
    notes: tuple[str, ...]  # what was taken for granted


class _Found(NamedTuple):
    member: Member
    split: str  # "": not said
    label: str | None


def find(path: Path, labels: str, *, validation_fraction: float) -> Listing:
    """List the images of a folder, zip or tar; `labels` as in DatasetConfig."""
    source = open_source(path)
    members = list(source.members())
    left_out = [(member.name, member.problem) for member in members if member.problem]
    usable = [member for member in members if not member.problem]
    pictures = [member for member in usable if _is_picture(member.name)]
    if not pictures:
        raise _no_images(path, left_out)
    notes = []
    others = Counter(PurePosixPath(member.name).suffix.lower() or "no suffix" for member in usable)
    others = Counter({suffix: count for suffix, count in others.items() if suffix not in _PICTURES})
    if others:
        kinds = ", ".join(f"{printable(suffix)} {count}" for suffix, count in others.most_common(5))
        notes.append(f"{others.total()} files that are no pictures are passed over: {kinds}.")
    if labels in ("folders", "none"):
        found, loose = _by_folders(pictures, labels == "folders", path, notes)
        left_out += loose
    else:
        found = _by_table(pictures, usable, source, path, labels, notes)
    names = sorted({image.label for image in found if image.label is not None})
    if len(names) == 1:
        notes.append(f"All images are of one class, {printable(names[0])}.")
    number = {name: index for index, name in enumerate(names)}
    entries = [
        Entry(image.member, split, number[image.label] if image.label is not None else -1)
        for image, split in _with_splits(sorted(found, key=_mixing), validation_fraction, path, notes)
    ]
    untaught = sorted(set(range(len(names))) - {entry.label for entry in entries if entry.split == "train"})
    if untaught:
        notes.append(
            f"Classes without a training image: {', '.join(printable(names[label]) for label in untaught[:10])}."
        )
    entries.sort(key=lambda entry: SPLITS.index(entry.split))  # stable: keeps the mixing
    return Listing(tuple(entries), tuple(names), tuple(left_out), tuple(notes))


def check_source(path: Path, labels: str) -> None:
    """Refuse a source that is missing, of the wrong kind, or without any image; looks no further than the first."""
    source = open_source(path)
    problems = []
    for member in source.members():
        if member.problem:
            problems.append((member.name, member.problem))
        elif _is_picture(member.name):
            break
    else:
        raise _no_images(path, problems)
    if labels not in ("folders", "none") and path.is_dir():
        table = _table_name(path, labels)
        if table.startswith(("/", "../")) or not (path / table).is_file():
            raise _no_table(path, labels)


def _is_picture(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in _PICTURES


def _mixing(image: _Found) -> tuple[bytes, int]:
    return hashlib.sha256(image.member.name.encode("utf-8", "surrogateescape")).digest(), image.member.location


def _no_images(path: Path, left_out: list[tuple[str, str]]) -> UserError:
    why = (
        f" The first of {len(left_out)} unusable files: {printable(left_out[0][0])}: {left_out[0][1]}."
        if left_out
        else ""
    )
    return UserError(f"There are no images.{why}", where=path, fix=LAYOUT, code=2)


def _class_name(folder: str) -> str:
    """Name a class in valid Unicode, composed, so that it can be written everywhere and compared."""
    return unicodedata.normalize("NFC", folder.encode("utf-8", "backslashreplace").decode())


def _by_folders(
    pictures: list[Member], labelled: bool, path: Path, notes: list[str]
) -> tuple[list[_Found], list[tuple[str, str]]]:
    """Read splits and classes off the folders' names; return also the images that stand outside of them."""
    parts = [(member, member.name.split("/")) for member in pictures]
    while True:  # step into an only folder that holds nothing but folders: the archive's or data set's own name
        tops = {names[0] for _, names in parts}
        if (
            len(tops) > 1
            or any(len(names) < 3 for _, names in parts)
            or {top.lower() for top in tops} & set(_SPLIT_FOLDERS)
        ):
            break
        notes.append(f"The only folder {printable(tops.pop())} is taken for the data set, its folders for classes.")
        parts = [(member, names[1:]) for member, names in parts]

    tops = {names[0] for _, names in parts if len(names) > 1}
    split_tops = {top for top in tops if top.lower() in _SPLIT_FOLDERS}
    splits = {_SPLIT_FOLDERS[top.lower()] for top in split_tops}
    if len(splits) > 1 and split_tops != tops:
        strangers = ", ".join(printable(top) for top in sorted(tops - split_tops)[:5])
        raise UserError(
            f"Split folders ({', '.join(sorted(split_tops))}) stand beside others ({strangers}).",
            where=path,
            fix="Move the others into a split folder, or out of the source.",
            code=4,
        )
    by_split = bool(tops) and split_tops == tops
    depth = int(by_split)
    any_class = labelled and any(len(names) > depth + 1 for _, names in parts)
    found, loose = [], []
    for member, names in parts:
        if by_split and len(names) == 1:
            loose.append((member.name, "outside of the split folders"))
        elif any_class and len(names) == depth + 1:
            loose.append((member.name, "outside of the class folders"))
        else:
            split = _SPLIT_FOLDERS[names[0].lower()] if by_split else ""
            found.append(_Found(member, split, _class_name(names[depth]) if any_class else None))
    if labelled and not any_class:
        notes.append("There are no class folders: the images have no labels.")
    if loose:
        notes.append(f"{len(loose)} images outside of the {'split' if by_split else 'class'} folders are left out.")
    return found, loose


def _by_table(
    pictures: list[Member], usable: list[Member], source: Source, path: Path, labels: str, notes: list[str]
) -> list[_Found]:
    """Read splits and classes from a CSV."""
    by_name = {member.name: member for member in usable}
    table = by_name.get(_table_name(path, labels))
    if table is None:
        raise _no_table(path, labels)

    def wrong(line: int, what: str) -> UserError:
        return UserError(f"Line {line} of the labels: {what}.", where=path / table.name, fix="Mend this line.", code=4)

    try:
        text = source.read(table).decode("utf-8-sig", "surrogateescape")
    except UnreadableFile as error:
        raise UserError(f"The labels: {error}.", where=path / table.name, fix="Make or copy it anew.", code=4) from None
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    found: dict[str, _Found] = {}
    lines: dict[str, int] = {}
    try:
        header = next(rows, [])
        if not {"path", "label"} <= set(header):
            raise wrong(1, f"the columns are {', '.join(map(printable, header)) or 'none'}, not path,label[,split]")
        for row in rows:
            line = rows.line_num
            if not row:
                continue
            if len(row) != len(header):
                raise wrong(line, f"{len(row)} fields, not {len(header)}")
            values = dict(zip(header, row, strict=True))
            name, label, split = values["path"].removeprefix("./"), values["label"], values.get("split", "")
            if name in lines:
                raise wrong(line, f"{printable(name)} stands in line {lines[name]} already")
            if name not in by_name:
                raise wrong(line, f"there is no file {printable(name)!r} in the source")
            if not label:
                raise wrong(line, "the label is empty")
            if "split" in header and split.lower() not in _SPLIT_FOLDERS:
                raise wrong(line, f"the split is {printable(split)!r}, not train, validation or test")
            lines[name] = line
            found[name] = _Found(by_name[name], _SPLIT_FOLDERS.get(split.lower(), ""), _class_name(label))
    except csv.Error as error:
        raise wrong(rows.line_num, str(error)) from None
    if not found:
        raise wrong(1, "no image follows")
    unnamed = sum(member.name not in found for member in pictures)
    if unnamed:
        notes.append(f"{unnamed} images that the labels do not name are passed over.")
    return list(found.values())


def _table_name(path: Path, labels: str) -> str:
    """Name the CSV as the source does; it may be given with the source's own path in front."""
    given = Path(labels)
    return (given.relative_to(path) if given.is_relative_to(path) else given).as_posix()


def _no_table(path: Path, labels: str) -> UserError:
    return UserError(
        f"dataset.labels is {labels!r}: neither folders, nor none, nor a CSV inside the source.",
        where=path,
        fix="Put the CSV (columns path,label and optionally split) into the source, where its changes are seen.",
        code=2,
    )


def _with_splits(
    found: Iterable[_Found], validation_fraction: float, path: Path, notes: list[str]
) -> list[tuple[_Found, str]]:
    """Give every image a split; where nobody named validation images, the first ones by hash are taken."""
    split = [(image, image.split or "train") for image in found]
    train = [position for position, (_, name) in enumerate(split) if name == "train"]
    if not train:
        raise UserError("There are no training images.", where=path, fix=LAYOUT, code=4)
    if validation_fraction and not any(name == "validation" for _, name in split):
        taken = min(max(1, round(len(train) * validation_fraction)), len(train) - 1)
        for position in train[:taken]:
            split[position] = split[position][0], "validation"
        notes.append(f"The source names no validation images: {taken} of {len(train)} are held out.")
    return split
