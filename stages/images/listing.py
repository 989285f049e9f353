"""Listing of a source: its images with their splits and classes, read from names without decoding anything.

    cat/1.png                        class folders
    train/cat/1.png  val/cat/2.png   split folders, of class folders or of images
    1.png                            images without labels
    labels.csv                       columns path,label and optionally split; inside the source, so that DVC tracks it

Images are ordered by a hash of their names, which is independent of the disk and mixes the classes.
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
_EXPECTED_LAYOUT = "Use class folders of images (cat/1.png), with or without train/ and validation/ above them."
_SPLIT_FOLDERS = {
    "train": "train", "training": "train",
    "validation": "validation", "val": "validation", "valid": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
_IMAGE_SUFFIXES = frozenset({  # also of unsupported formats, which are then rejected by name instead of ignored
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff",
    ".eps", ".psd", ".svg", ".heic", ".heif", ".avif", ".pdf", ".ico", ".jp2", ".ppm", ".pgm", ".tga",
})  # fmt: skip
_SHOWN_SUFFIXES = 5  # in the message about files that are not images
_SHOWN_CLASSES = 10  # in the message about classes without a training image
_SHOWN_FOLDERS = 5  # in the error about folders beside split folders


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


class _Candidate(NamedTuple):
    """An image file before splits are assigned and classes are numbered."""

    member: Member
    split: str  # "": the source names none
    label: str | None


def list_images(path: Path, labels: str, *, validation_fraction: float) -> Listing:
    """List the images of a folder, zip or tar. `labels` and `validation_fraction` are as in DatasetConfig.

    Raises UserError if there are no (training) images, or if the folders or the labels CSV are inconsistent.
    """
    source = open_source(path)
    members = list(source.members())
    skipped = [(member.name, member.problem) for member in members if member.problem]
    readable = [member for member in members if not member.problem]
    image_files = [member for member in readable if _is_image(member.name)]
    if not image_files:
        raise _no_images(path, skipped)
    messages = []
    suffixes = Counter(PurePosixPath(member.name).suffix.lower() or "no suffix" for member in readable)
    other_suffixes = Counter({suffix: count for suffix, count in suffixes.items() if suffix not in _IMAGE_SUFFIXES})
    if other_suffixes:
        counts = ", ".join(
            f"{printable(suffix)} {count}" for suffix, count in other_suffixes.most_common(_SHOWN_SUFFIXES)
        )
        messages.append(f"{other_suffixes.total()} files that are not images are ignored: {counts}.")
    if labels in ("folders", "none"):
        candidates, outside = _from_folders(image_files, labels == "folders", path, messages)
        skipped += outside
    else:
        candidates = _from_table(image_files, readable, source, path, labels, messages)
    classes = sorted({candidate.label for candidate in candidates if candidate.label is not None})
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
        messages.append(f"Classes without a training image: {names}.")
    images.sort(key=lambda image: SPLITS.index(image.split))  # stable: the hash order within a split stays
    return Listing(tuple(images), tuple(classes), tuple(skipped), tuple(messages))


def check_source(path: Path, labels: str) -> None:
    """Raise UserError if a source is missing, not a folder or archive, or without images. Stops at the first image."""
    source = open_source(path)
    problems = []
    for member in source.members():
        if member.problem:
            problems.append((member.name, member.problem))
        elif _is_image(member.name):
            break
    else:
        raise _no_images(path, problems)
    if labels not in ("folders", "none") and path.is_dir():
        table = _table_name(path, labels)
        if table.startswith(("/", "../")) or not (path / table).is_file():
            raise _no_table(path, labels)


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in _IMAGE_SUFFIXES


def _name_hash(candidate: _Candidate) -> tuple[bytes, int]:
    """Return the sort key of an image. The location separates members of one name, which a zip may have."""
    name = candidate.member.name.encode("utf-8", "surrogateescape")
    return hashlib.sha256(name).digest(), candidate.member.location


def _no_images(path: Path, skipped: list[tuple[str, str]]) -> UserError:
    reason = ""
    if skipped:
        name, problem = skipped[0]
        reason = f" The first of {len(skipped)} unusable files: {printable(name)}: {problem}."
    return UserError(f"The source has no images.{reason}", where=path, fix=_EXPECTED_LAYOUT, code=2)


def _class_name(folder: str) -> str:
    """Normalize a class name to valid Unicode in form NFC: any file can hold it, and equal names compare equal."""
    return unicodedata.normalize("NFC", folder.encode("utf-8", "backslashreplace").decode())


def _from_folders(
    image_files: list[Member], labelled: bool, path: Path, messages: list[str]
) -> tuple[list[_Candidate], list[tuple[str, str]]]:
    """Read splits and classes from folder names. Also return the images outside these folders, with a reason each."""
    paths = [(member, member.name.split("/")) for member in image_files]
    while True:  # skip a single top folder that holds only folders: the name of the archive or of the dataset
        tops = {names[0] for _, names in paths}
        if (
            len(tops) > 1
            or any(len(names) < 3 for _, names in paths)
            or {top.lower() for top in tops} & set(_SPLIT_FOLDERS)
        ):
            break
        messages.append(
            f"The single top folder {printable(tops.pop())} is taken as the dataset, its folders as classes."
        )
        paths = [(member, names[1:]) for member, names in paths]

    tops = {names[0] for _, names in paths if len(names) > 1}
    split_tops = {top for top in tops if top.lower() in _SPLIT_FOLDERS}
    splits = {_SPLIT_FOLDERS[top.lower()] for top in split_tops}
    if len(splits) > 1 and split_tops != tops:
        others = ", ".join(printable(top) for top in sorted(tops - split_tops)[:_SHOWN_FOLDERS])
        raise UserError(
            f"The source has split folders ({', '.join(sorted(split_tops))}) beside other folders ({others}).",
            where=path,
            fix="Move the other folders into a split folder, or out of the source.",
            code=4,
        )
    by_split = bool(tops) and split_tops == tops
    depth = int(by_split)  # folders above the class folder
    has_classes = labelled and any(len(names) > depth + 1 for _, names in paths)
    candidates, outside = [], []
    for member, names in paths:
        if by_split and len(names) == 1:
            outside.append((member.name, "outside the split folders"))
        elif has_classes and len(names) == depth + 1:
            outside.append((member.name, "outside the class folders"))
        else:
            split = _SPLIT_FOLDERS[names[0].lower()] if by_split else ""
            candidates.append(_Candidate(member, split, _class_name(names[depth]) if has_classes else None))
    if labelled and not has_classes:
        messages.append("There are no class folders: the images have no labels.")
    if outside:
        messages.append(f"{len(outside)} images outside the {'split' if by_split else 'class'} folders are skipped.")
    return candidates, outside


def _from_table(
    image_files: list[Member], readable: list[Member], source: Source, path: Path, labels: str, messages: list[str]
) -> list[_Candidate]:
    """Read splits and classes from a CSV."""
    by_name = {member.name: member for member in readable}
    table = by_name.get(_table_name(path, labels))
    if table is None:
        raise _no_table(path, labels)

    def invalid(line: int, problem: str) -> UserError:
        return UserError(
            f"Line {line} of the labels is invalid: {problem}.", where=path / table.name, fix="Fix this line.", code=4
        )

    try:
        text = source.read(table).decode("utf-8-sig", "surrogateescape")
    except UnreadableFile as error:
        raise UserError(
            f"The labels cannot be read: {error}.", where=path / table.name, fix="Run the same command again.", code=4
        ) from None
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    candidates: dict[str, _Candidate] = {}
    lines: dict[str, int] = {}
    try:
        header = next(rows, [])
        if not {"path", "label"} <= set(header):
            columns = ", ".join(map(printable, header)) or "none"
            raise invalid(1, f"the columns must be path,label[,split], got {columns}")
        for row in rows:
            line = rows.line_num
            if not row:
                continue
            if len(row) != len(header):
                raise invalid(line, f"it must have {len(header)} fields, got {len(row)}")
            values = dict(zip(header, row, strict=True))
            name, label, split = values["path"].removeprefix("./"), values["label"], values.get("split", "")
            if name in lines:
                raise invalid(line, f"{printable(name)} is already listed in line {lines[name]}")
            if name not in by_name:
                raise invalid(line, f"the source has no file {printable(name)!r}")
            if not label:
                raise invalid(line, "the label is empty")
            if "split" in header and split.lower() not in _SPLIT_FOLDERS:
                raise invalid(line, f"the split must be train, validation or test, got {printable(split)!r}")
            lines[name] = line
            candidates[name] = _Candidate(by_name[name], _SPLIT_FOLDERS.get(split.lower(), ""), _class_name(label))
    except csv.Error as error:
        raise invalid(rows.line_num, str(error)) from None
    if not candidates:
        raise invalid(1, "no image is listed below the header")
    unlisted = sum(member.name not in candidates for member in image_files)
    if unlisted:
        messages.append(f"{unlisted} images that the labels do not list are ignored.")
    return list(candidates.values())


def _table_name(path: Path, labels: str) -> str:
    """Return the CSV's name inside the source. `labels` may include the path of the source."""
    table = Path(labels)
    return (table.relative_to(path) if table.is_relative_to(path) else table).as_posix()


def _no_table(path: Path, labels: str) -> UserError:
    return UserError(
        f"dataset.labels must be folders, none, or a CSV inside the source, got {labels!r}.",
        where=path,
        fix="Move the CSV (columns path,label and optionally split) into the source, where DVC tracks its changes.",
        code=2,
    )


def _assign_splits(
    candidates: Iterable[_Candidate], validation_fraction: float, path: Path, messages: list[str]
) -> list[tuple[_Candidate, str]]:
    """Assign a split to each image. Without validation images in the source, hold out the first training images."""
    assigned = [(candidate, candidate.split or "train") for candidate in candidates]
    train = [position for position, (_, split) in enumerate(assigned) if split == "train"]
    if not train:
        raise UserError("The source has no training images.", where=path, fix=_EXPECTED_LAYOUT, code=4)
    if validation_fraction and not any(split == "validation" for _, split in assigned):
        held_out = min(max(1, round(len(train) * validation_fraction)), len(train) - 1)
        for position in train[:held_out]:
            assigned[position] = assigned[position][0], "validation"
        messages.append(f"The source has no validation images: {held_out} of {len(train)} images are held out.")
    return assigned
