"""Splits and classes from folder names.

cat/1.png                                   class folders
train/cat/1.png      dev/cat/2.png          split folders, of class folders or of images
images/train/1.png   masks/train/1.png      the same in a folder of images; folders of annotations are left out
train/images/1.png   train/masks/1.png      the same in split folders
cat/train/1.png      cat/test/2.png         split folders in class folders
1.png                                       images without labels
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from stages.errors import UserError
from stages.images.sources import Member, printable

_SPLIT_NAMES = {
    "train": "train", "training": "train",
    "val": "validation", "validation": "validation", "valid": "validation", "dev": "validation",
    "eval": "validation", "evaluation": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
_AFFIX = r"(?:images?|imgs?|data|set|split)"  # around the name of a split, as in train_images, test-set and val2017
_SPLIT_PATTERN = re.compile(
    rf"(?:{_AFFIX}[ _.-]*)?({'|'.join(_SPLIT_NAMES)})(?:[ _.-]*(?:{_AFFIX}|\d{{3,4}}))?", re.IGNORECASE
)
_IMAGE_FOLDERS = {"images", "image", "imgs", "img", "jpegimages", "pictures", "photos", "data"}
_ANNOTATION_FOLDERS = {
    "annotations", "annotation", "labels", "label", "masks", "mask", "segmentation", "segmentations",
    "segmentationclass", "segmentationobject", "gt", "groundtruth", "ground_truth",
}  # fmt: skip
RENAME_TO_UTF8 = "Rename it, or all names in a folder: convmv -f latin1 -t utf8 --notest -r FOLDER"
_SHOWN_FOLDERS = 5  # in a message
_SHARED_FRACTION = 0.5  # of the subfolders of two class folders, from which they look like splits

_Named = tuple[Member, list[str]]  # an image file, and the parts of its name that are still to be interpreted


class Candidate(NamedTuple):
    """An image file before splits are assigned and classes are numbered."""

    member: Member
    split: str  # "": the source names none
    label: str | None


@dataclass
class FolderLayout:
    """Interpretation of the folder names of a source."""

    candidates: list[Candidate] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)  # image files that are not used: name, reason
    messages: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)  # interpretations that may be wrong


def split_of(name: str) -> str:
    """Return the split that a folder or a value of a table names, such as validation for "val2017"; "" if none."""
    match = _SPLIT_PATTERN.fullmatch(name.strip())
    return _SPLIT_NAMES[match[1].lower()] if match else ""


def class_name(name: str) -> str:
    """Normalize a class name to Unicode's form NFC, in which equal names compare equal."""
    return unicodedata.normalize("NFC", name)


def split_folders(names: Iterable[str]) -> dict[str, str]:
    """Return the split of each name if all of them are in split folders below common folders; else nothing."""
    parts = {name: name.split("/") for name in names}
    while parts and all(len(steps) > 1 for steps in parts.values()):
        splits = {name: split_of(steps[0]) for name, steps in parts.items()}
        if all(splits.values()):
            return splits
        if len({steps[0] for steps in parts.values()}) > 1:
            break
        parts = {name: steps[1:] for name, steps in parts.items()}
    return {}


def read_folders(image_files: list[Member], labelled: bool, path: Path) -> FolderLayout:
    """Read splits and, if `labelled`, classes from folder names.

    Raises UserError if split folders are beside other folders, or if the name of a split or class is not UTF-8.
    """
    layout = FolderLayout()
    named = _skip_wrappers([(member, member.name.split("/")) for member in image_files], layout)
    tops = _tops(named)
    split_tops = {top for top in tops if split_of(top)}
    annotation_tops = {top for top in tops - split_tops if _is_annotation(top)}
    if len(split_tops) > 1 and annotation_tops:
        named = _leave_out(named, annotation_tops, layout)
        tops -= annotation_tops
    if len({split_of(top) for top in split_tops}) > 1 and split_tops != tops:
        raise _mixed_folders(path, "", sorted(split_tops), tops - split_tops)
    if split_tops and split_tops == tops:
        _note_splits(split_tops, layout)
        outside = [(member, names) for member, names in named if len(names) == 1]
        _skip(outside, "outside the split folders", layout)
        splits = {member: split_of(names[0]) for member, names in named}
        named = [(member, names[1:]) for member, names in named if len(names) > 1]
        named = _skip_image_folder(named, layout)
    elif _has_splits_in_classes(named, tops, path):
        layout.messages.append("The split folders are inside of the class folders.")
        named = _skip_outside(named, layout)
        _skip([file for file in named if _is_annotation(file[1][1])], "in a folder of annotations", layout)
        named = [file for file in named if not _is_annotation(file[1][1])]
        splits = {member: split_of(names[1]) for member, names in named}
        named = [(member, [names[0], *names[2:]]) for member, names in named]
    else:
        splits = {}
    _read_classes(named, splits, labelled, path, layout)
    return layout


def _read_classes(
    named: list[_Named], splits: dict[Member, str], labelled: bool, path: Path, layout: FolderLayout
) -> None:
    has_classes = labelled and any(len(names) > 1 for _, names in named)
    classes: dict[str, str] = {}  # folder -> class
    if has_classes:
        classes = {folder: _checked_name(folder, path) for folder in sorted(_tops(named))}
        _skip([(member, names) for member, names in named if len(names) == 1], "outside the class folders", layout)
        named = [(member, names) for member, names in named if len(names) > 1]
        _doubt_classes(named, classes.values(), layout)
    elif labelled:
        layout.messages.append("There are no class folders: the images have no labels.")
    for member, names in named:
        label = classes[names[0]] if has_classes else None
        layout.candidates.append(Candidate(member, splits.get(member, ""), label))


def _skip_wrappers(named: list[_Named], layout: FolderLayout) -> list[_Named]:
    """Skip folders around the dataset: a folder of images beside annotations, and a single folder of folders."""
    while True:
        outer = _tops(named)
        if len(outer) == 1 and not split_of(min(outer)) and _names_splits(_subfolders(named)[min(outer)]):
            named = _skip_outside(named, layout)
        inner = _skip_image_folder(named, layout)
        tops = {names[0] for _, names in inner}
        if inner is named and (
            len(tops) > 1 or any(len(names) < 3 for _, names in inner) or any(split_of(top) for top in tops)
        ):
            return named
        if inner is named:
            layout.messages.append(
                f"The single top folder {printable(tops.pop())} is taken as the dataset, its folders as classes."
            )
            inner = [(member, names[1:]) for member, names in named]
        named = inner


def _skip_image_folder(named: list[_Named], layout: FolderLayout) -> list[_Named]:
    """Skip a folder such as images/ that is alone or beside annotations, which are left out."""
    tops = _tops(named)
    image_tops = {top for top in tops if top.lower() in _IMAGE_FOLDERS}
    others = tops - image_tops
    if len(image_tops) != 1 or any(len(names) == 1 for _, names in named):
        return named
    if not all(_is_annotation(top) for top in others):
        return named
    if others:
        named = _leave_out(named, others, layout)
    layout.messages.append(f"The folder {printable(image_tops.pop())} holds the images and is not a class.")
    return [(member, names[1:]) for member, names in named]


def _leave_out(named: list[_Named], tops: Collection[str], layout: FolderLayout) -> list[_Named]:
    _skip([(member, names) for member, names in named if names[0] in tops], "in a folder of annotations", layout)
    return [(member, names) for member, names in named if names[0] not in tops]


def _skip(named: list[_Named], reason: str, layout: FolderLayout) -> None:
    layout.skipped += [(member.name, reason) for member, _ in named]


def _skip_outside(named: list[_Named], layout: FolderLayout) -> list[_Named]:
    """Skip images beside the split folders that are in each top folder, and beside the top folders."""
    _skip([(member, names) for member, names in named if len(names) < 3], "outside the split folders", layout)
    return [(member, names) for member, names in named if len(names) > 2]


def _has_splits_in_classes(named: list[_Named], tops: set[str], path: Path) -> bool:
    """Return whether every folder holds split folders. Raises UserError if only some do, or if one holds others too."""
    subfolders = _subfolders(named)
    split_tops = sorted(top for top in tops if _names_splits(subfolders[top]))
    for top in split_tops:
        splits = {name for name in subfolders[top] if split_of(name)}
        if others := {name for name in subfolders[top] - splits if not _is_annotation(name)}:
            raise _mixed_folders(path, f" in {printable(top)}", sorted(splits), others)
        if others := tops - set(split_tops):
            raise _mixed_folders(path, f" in {printable(top)}", sorted(splits), others)
    return bool(split_tops)


def _names_splits(folders: Iterable[str]) -> bool:
    """Return whether folders are named like several splits."""
    return len({split_of(name) for name in folders} - {""}) > 1


def _mixed_folders(path: Path, where: str, split_tops: list[str], others: Collection[str]) -> UserError:
    splits = _join_first(split_tops)
    return UserError(
        f"The source has split folders ({splits}){where} beside other folders ({_join_first(others)}).",
        where=path,
        fix="Move the other folders into a split folder, or out of the source.",
        code=4,
    )


def _note_splits(split_tops: Collection[str], layout: FolderLayout) -> None:
    """Add doubts about split folders: a single one, and several of one split."""
    by_split: dict[str, list[str]] = defaultdict(list)
    for top in sorted(split_tops):
        by_split[split_of(top)].append(top)
    if len(by_split) == 1 and "train" in by_split:
        layout.doubts.append(
            f"The only split folder is {_join_first(split_tops)}; the source has no validation or test images."
        )
    for split, folders in by_split.items():
        if len(folders) > 1:
            layout.doubts.append(f"The folders {_join_first(folders)} are all used as {split} images.")


def _doubt_classes(named: list[_Named], classes: Collection[str], layout: FolderLayout) -> None:
    """Add doubts about classes that look like splits or annotations."""
    for name in sorted(set(classes)):
        if split := split_of(name):
            layout.doubts.append(
                f"The folder {printable(name)} is used as a class, although it is named like the {split} images: it is "
                "beside or inside of other folders."
            )
    if annotations := [name for name in sorted(set(classes)) if _is_annotation(name)]:
        layout.doubts.append(
            f"The folders {_join_first(annotations)} are used as classes, although annotations have such names."
        )
    subfolders = _subfolders(named)
    first, *others = [top for top in sorted(subfolders) if len(subfolders[top]) > 1] or [""]
    similar = [
        top
        for top in others
        if len(subfolders[first] & subfolders[top]) > _SHARED_FRACTION * len(subfolders[first] | subfolders[top])
    ]
    if similar:
        shared = sorted(subfolders[first] & subfolders[similar[0]])
        layout.doubts.append(
            f"The folders {_join_first([first, *similar])} are used as classes, although they share the subfolders "
            f"{_join_first(shared)}. If they are splits, name them train, val and test."
        )


def _subfolders(named: list[_Named]) -> dict[str, set[str]]:
    """Return the folders in each top folder."""
    subfolders: dict[str, set[str]] = defaultdict(set)
    for _, names in named:
        if len(names) > 2:
            subfolders[names[0]].add(names[1])
    return subfolders


def _checked_name(folder: str, path: Path) -> str:
    """Return the class of a folder. Raises UserError if its name is not UTF-8, which no class name may hold."""
    if not is_utf8(folder):
        raise UserError(
            f"The name of a class folder is not UTF-8: {printable(folder)}.", where=path, fix=RENAME_TO_UTF8, code=4
        )
    return class_name(folder)


def is_utf8(name: str) -> bool:
    """Return whether the bytes of a file name or an argument are UTF-8; Python decodes others to surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_annotation(folder: str) -> bool:
    return folder.lower() in _ANNOTATION_FOLDERS


def _tops(named: list[_Named]) -> set[str]:
    return {names[0] for _, names in named if len(names) > 1}


def _join_first(names: Iterable[str]) -> str:
    """Join the first names and append the number of the others."""
    ordered = [printable(name) for name in sorted(names)]
    omitted = len(ordered) - _SHOWN_FOLDERS
    return ", ".join(ordered[:_SHOWN_FOLDERS]) + (f" and {omitted} more" if omitted > 0 else "")
