"""Overview of a source before work: splits, classes, sizes, formats, copies, and examples of each class.

Counts come from names (listing.py). `scan` reads the headers of the images, one file at a time.
"""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from stages.config import DatasetConfig
from stages.images.decode import Header, RejectedImage, decode, read_header
from stages.images.listing import SPLITS, ListedImage, Listing
from stages.images.sources import Member, Source, UnreadableFile, printable

UNLABELED = ""  # the class of images without labels, in counts and examples
_HEADER_BYTES = 1 << 16  # of a file that are read first; the whole file is read if its header is longer
_MAX_HASHED_BYTES = 1 << 31  # of files that are read wholly to find copies, because another file has the same size
_PROGRESS_INTERVAL = 50  # files between reports of progress
_SHOWN_CLASSES = 10  # in a line of text
_SHOWN_FILES = 20  # of a scan, by name


@dataclass
class Scan:
    """Properties of image files, read from their headers."""

    checked: int = 0  # files
    widths: Counter[int] = field(default_factory=Counter)
    heights: Counter[int] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    smaller: int = 0  # images smaller than image_size
    not_square: int = 0
    rejected: list[tuple[str, str]] = field(default_factory=list)  # the first files that cannot be used: name, reason
    num_rejected: int = 0
    copies: int = 0  # files with the bytes of an earlier one
    leaked: int = 0  # of these, files that are in another split than the earlier one
    first_copies: list[tuple[str, str]] = field(default_factory=list)  # the first ones: name, name of the earlier file
    copies_checked: bool = True  # False: there are too many files of equal sizes, or only a sample is read


def count_splits(listing: Listing) -> dict[str, int]:
    """Count the images of each split."""
    counts = Counter(image.split for image in listing.images)
    return {split: counts[split] for split in SPLITS}


def count_classes(listing: Listing) -> dict[str, dict[str, int]]:
    """Count the images of each class in each split, largest class first."""
    counts = Counter((image.label, image.split) for image in listing.images)
    classes = {name: {split: counts[label, split] for split in SPLITS} for label, name in enumerate(listing.classes)}
    return dict(sorted(classes.items(), key=lambda item: -sum(item[1].values())))


def describe(listing: Listing) -> list[str]:
    """Describe splits, classes, assumptions and doubts in a few lines."""
    splits = ", ".join(f"{split} {count}" for split, count in count_splits(listing).items() if count)
    lines = [f"Images: {splits}."]
    if listing.classes:
        totals = [(name, sum(counts.values())) for name, counts in count_classes(listing).items()]
        classes = ", ".join(f"{printable(name)} {count}" for name, count in totals[:_SHOWN_CLASSES])
        omitted = len(totals) - _SHOWN_CLASSES
        more = f" and {omitted} more, the smallest with {totals[-1][1]}" if omitted > 0 else ""
        lines.append(f"Classes ({len(totals)}): {classes}{more}.")
    return [*lines, *listing.messages, *(f"DOUBT: {doubt}" for doubt in listing.doubts)]


def scan(
    source: Source,
    images: Sequence[ListedImage],
    dataset: DatasetConfig,
    *,
    find_copies: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Scan:
    """Read the headers of images, in the order of their location. `progress` gets the files done and in total.

    With `find_copies`, files of equal sizes are read wholly and compared by their digests.
    """
    result = Scan()
    files_by_size = Counter(image.member.size for image in images)
    hashed_bytes = sum(size * count for size, count in files_by_size.items() if count > 1)
    result.copies_checked = find_copies and hashed_bytes <= _MAX_HASHED_BYTES
    first_by_digest: dict[bytes, ListedImage] = {}
    for image in sorted(images, key=lambda image: image.member.location):
        compare = result.copies_checked and files_by_size[image.member.size] > 1
        try:
            data = source.read(image.member) if compare else source.read_start(image.member, _HEADER_BYTES)
            header = _header(source, image.member, data, dataset)
        except (UnreadableFile, RejectedImage) as error:
            result.num_rejected += 1
            if len(result.rejected) < _SHOWN_FILES:
                result.rejected.append((image.member.name, printable(str(error))))
        else:
            _add(result, header, dataset)
            if compare:
                digest = hashlib.sha256(data).digest()
                first = first_by_digest.setdefault(digest, image)
                if first is not image:
                    result.copies += 1
                    result.leaked += first.split != image.split
                    if len(result.first_copies) < _SHOWN_FILES:
                        result.first_copies.append((image.member.name, first.member.name))
        result.checked += 1
        if result.checked % _PROGRESS_INTERVAL == 0 or result.checked == len(images):
            progress(result.checked, len(images))
    return result


def sample_images(images: Sequence[ListedImage], count: int) -> Sequence[ListedImage]:
    """Choose `count` images at equal distances, which keeps the shares of the splits; 0 chooses all."""
    if not count or count >= len(images):
        return images
    return [images[index * len(images) // count] for index in range(count)]


def examples(
    source: Source, listing: Listing, dataset: DatasetConfig, *, classes: Sequence[str], count: int, side: int
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield a class and its first images, uint8 (N, side, side, 3), converted as the stage `shard` does.

    `classes` may be (UNLABELED,). Images that cannot be decoded are left out, and so are classes without any other.
    """
    config = dataclasses.replace(dataset, image_size=side)
    chosen: dict[str, list[Member]] = {name: [] for name in classes}
    for image in listing.images:
        members = chosen.get(listing.classes[image.label] if image.label >= 0 else UNLABELED)
        if members is not None and len(members) < count:
            members.append(image.member)
    pixels: dict[str, list[np.ndarray]] = {name: [] for name in classes}
    by_location = sorted(
        ((member, name) for name, members in chosen.items() for member in members), key=lambda item: item[0].location
    )
    for member, name in by_location:
        with suppress(UnreadableFile, RejectedImage):
            pixels[name].append(decode(source.read(member), config).pixels)
    yield from ((name, np.stack(images)) for name, images in pixels.items() if images)


def _header(source: Source, member: Member, data: bytes, dataset: DatasetConfig) -> Header:
    """Read the header from the first bytes of a file, or from the whole file if they are too few."""
    try:
        return read_header(data, dataset)
    except RejectedImage:
        if len(data) >= member.size:
            raise
        return read_header(source.read(member), dataset)


def _add(result: Scan, header: Header, dataset: DatasetConfig) -> None:
    result.widths[header.width] += 1
    result.heights[header.height] += 1
    result.formats[header.file_format] += 1
    result.modes[header.mode] += 1
    result.smaller += min(header.width, header.height) < dataset.image_size
    result.not_square += header.width != header.height


def quantiles(counts: Counter[int]) -> tuple[int, int, int]:
    """Return the minimum, the median and the maximum of counted values."""
    below, half, middle = 0, (counts.total() + 1) // 2, 0
    for value in sorted(counts):
        below += counts[value]
        if below >= half:
            middle = value
            break
    return min(counts), middle, max(counts)
