"""Turn a source of images into shards.

reads   source   a folder, zip or tar of images    images/sources.py, listing.py, decode.py
writes  out      image shards and their index      formats/shards.py
        metrics  number of images                   formats/curves.py

Each part is one shard, written by one worker. The listing alone decides names, keys and order, so the same source and
settings give the same bytes on any number of workers. A rerun skips finished shards.
"""

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import ImageColor

from stages.config import DatasetConfig
from stages.errors import UserError
from stages.formats import artifact, curves
from stages.formats.shard_reports import ReportSummary, ShardReport
from stages.formats.shards import INDEX, KIND, REJECTED, EncodedImage, IndexRow, write_index, write_shard
from stages.images.compressed_tar import decompress
from stages.images.count import format_count
from stages.images.decode import RejectedImage, decode, encode
from stages.images.listing import SPLITS, ListedImage, Listing, list_images
from stages.images.overview import describe
from stages.images.sources import Member, UnreadableFile, open_source, printable
from stages.mapping.parts import map_parts
from stages.runtime.context import StageContext

_KEY_DIGITS = 9
_SHOWN_REJECTED = 20  # files in the error about too many rejected images

Rejections = list[tuple[str, str]]  # name, reason


def run(source: Path, out: Path, metrics: Path, *, dataset: DatasetConfig, context: StageContext) -> None:
    """Write the shards. Raises UserError if too many images, or all training images, are rejected."""
    _check_background(dataset)
    decompressed = context.work_dir / "source.tar"
    tar = decompress(source, decompressed, context.reporter.message)
    listing = list_images(source, dataset.labels, validation_fraction=dataset.validation_fraction, decompressed=tar)
    for line in describe(listing):
        context.reporter.message(line)

    work = context.work_dir / "parts"
    parts = _plan(listing, dataset, work)
    classes, skipped = listing.classes, listing.skipped
    num_images = len(listing.images)
    del listing  # takes some hundred bytes per image
    arguments = (source.absolute(), work.absolute(), dataset, tar and tar.absolute())
    map_parts(WriteShard, arguments, parts, context=context, unit="images")

    summary = ReportSummary(classes)
    for report in _reports(work, parts):
        summary.add(report)
    rejected = summary.rejected
    _check_rejected(rejected, num_images, source, dataset)
    counts = summary.counts(len(skipped))
    for message in _warnings(counts):
        context.reporter.message(message)
    _check_train_images(counts["images"]["train"], rejected, source)

    settings = {name: value for name, value in asdict(dataset).items() if name != "source"}
    meta = {"image_size": dataset.image_size, "classes": classes, "settings": settings, **counts}
    with artifact.commit_folder(out, KIND, meta, summary.hashes) as folder:
        for shard in summary.hashes:
            artifact.link_or_copy(work / shard, folder / shard)
        write_index(folder / INDEX, (report.rows for report in _reports(work, parts) if report.rows))
        _write_rejected(folder / REJECTED, [*skipped, *rejected])

    curves.write_metrics(metrics, {"images": sum(counts["images"].values())})
    decompressed.unlink(missing_ok=True)


class WriteShard:
    """Mapper that writes one shard per part: decodes, converts and encodes its images."""

    def __init__(self, source: Path, work: Path, dataset: DatasetConfig, decompressed: Path | None):
        self.source, self.work, self.dataset = open_source(source, decompressed), work, dataset

    def __call__(self, part: Mapping[str, Any]) -> dict[str, Any]:
        shard = part["shard"]
        report = self._read_finished(shard) or self._write(shard)
        return {"images": len(report["rows"]), "rejected": len(report["rejected"])}

    def _read_finished(self, shard: str) -> dict[str, Any] | None:
        """Return the report of a shard that is finished, undamaged and of the current plan."""
        try:
            report = json.loads(_report_path(self.work, shard).read_text("utf-8"))
            hashes = artifact.sha256(_plan_path(self.work, shard)), artifact.sha256(self.work / shard)
            return report if (report["plan"], report["sha256"]) == hashes else None
        except (OSError, ValueError, KeyError):
            return None

    def _write(self, shard: str) -> dict[str, Any]:
        plan = json.loads(_plan_path(self.work, shard).read_text("utf-8"))
        encoded: dict[str, EncodedImage] = {}
        rejected: Rejections = []
        conversions: Counter[str] = Counter()
        extension = "png" if self.dataset.image_format == "png" else "jpg"
        # Read by location, in the order of the disk. Write by key.
        for key, member_fields, label in sorted(plan["images"], key=lambda image: Member(*image[1]).location):
            member = Member(*member_fields)
            try:
                decoded = decode(self.source.read(member), self.dataset)
            except (UnreadableFile, RejectedImage) as error:
                rejected.append((member.name, printable(str(error))))
                continue
            conversions.update(decoded.conversions)
            origin = {"name": member.name} | ({"label": plan["classes"][str(label)]} if label >= 0 else {})
            encoded[key] = EncodedImage(key, encode(decoded.pixels, self.dataset), extension, label, origin)
        images = [encoded[key] for key in sorted(encoded)]

        temporary = self.work / f"{shard}.writing"
        locations = write_shard(temporary, images)  # key -> offset, length
        rows = [
            IndexRow(
                image.key,
                plan["split"],
                image.label,
                shard,
                *locations[image.key],
                hashlib.sha256(image.data).hexdigest(),
                printable(image.origin["name"]),
            )
            for image in images
        ]
        report = {
            "plan": artifact.sha256(_plan_path(self.work, shard)),
            "sha256": artifact.sha256(temporary),
            "rows": rows,
            "rejected": sorted(rejected),
            "conversions": dict(sorted(conversions.items())),
        }
        temporary.replace(self.work / shard)
        _write_json(_report_path(self.work, shard), report)
        return report


def _check_background(dataset: DatasetConfig) -> None:
    """Raise UserError for an invalid colour, which would otherwise reject every transparent image."""
    try:
        ImageColor.getrgb(dataset.background)
    except ValueError:
        raise UserError(
            f"dataset.background must be a colour, got {dataset.background!r}.",
            where="params.yaml",
            fix="Set dataset.background to a name or #rrggbb, such as #ffffff.",
            code=2,
        ) from None


def _plan(listing: Listing, dataset: DatasetConfig, work: Path) -> list[dict[str, Any]]:
    """Write a plan file per shard that lists its images; return the parts, which hold only the shards' names."""
    work.mkdir(parents=True, exist_ok=True)
    parts = []
    for number, split, numbered_images in _group_into_shards(listing.images, dataset.images_per_shard):
        shard = f"{split}-{number:05d}.tar"
        images = [(f"{position:0{_KEY_DIGITS}d}", image.member, image.label) for position, image in numbered_images]
        classes = {str(label): listing.classes[label] for _, _, label in images if label >= 0}
        _write_json(_plan_path(work, shard), {"split": split, "classes": classes, "images": images})
        parts.append({"shard": shard, "weight": len(images)})
    return parts


def _group_into_shards(
    images: tuple[ListedImage, ...], images_per_shard: int
) -> Iterator[tuple[int, str, list[tuple[int, ListedImage]]]]:
    """Yield number, split, and numbered images of each shard. Images are numbered over the whole dataset."""
    numbered = list(enumerate(images))
    for split in SPLITS:
        of_split = [(position, image) for position, image in numbered if image.split == split]
        for number, start in enumerate(range(0, len(of_split), images_per_shard)):
            yield number, split, of_split[start : start + images_per_shard]


def _reports(work: Path, parts: list[dict[str, Any]]) -> Iterator[ShardReport]:
    """Read the reports of all shards, one at a time."""
    return (ShardReport.read(_report_path(work, part["shard"])) for part in parts)


def _check_rejected(rejected: Rejections, images: int, source: Path, dataset: DatasetConfig) -> None:
    """Raise UserError with the first rejected files if they exceed dataset.max_rejected_fraction."""
    if len(rejected) <= images * dataset.max_rejected_fraction:
        return
    names = "".join(f"\n    {printable(name)}: {reason}" for name, reason in rejected[:_SHOWN_REJECTED])
    more = f"\n    and {len(rejected) - _SHOWN_REJECTED} more" if len(rejected) > _SHOWN_REJECTED else ""
    raise UserError(
        f"{len(rejected)} of {images} images are rejected:{names}{more}",
        where=source,
        fix=f"Fix or remove them, or raise dataset.max_rejected_fraction, which is {dataset.max_rejected_fraction}.",
        code=4,
    )


def _check_train_images(train_images: int, rejected: Rejections, source: Path) -> None:
    """Raise UserError if no training image is left."""
    if not train_images:
        name, reason = rejected[0]
        raise UserError(
            "All training images are rejected.",
            where=source,
            fix=f"Fix the training images; the first one, {printable(name)}: {reason}.",
            code=4,
        )


def _warnings(counts: Mapping[str, Any]) -> Iterator[str]:
    for conversion, count in counts["conversions"].items():
        yield f"{format_count(count, 'image', 'images')}: {conversion}."
    if counts["rejected"]:
        yield f"{format_count(counts['rejected'], 'image is', 'images are')} rejected; {REJECTED} lists the reasons."
    if counts["leaked"]:
        images = format_count(counts["leaked"], "validation image equals", "validation images equal")
        yield f"LEAK: {images} a training image, pixel for pixel."
    if counts["duplicates"]:
        yield f"{format_count(counts['duplicates'], 'image equals', 'images equal')} another image, pixel for pixel."


def _write_rejected(path: Path, unused: Rejections) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("name", "reason"))
        table.writerows((printable(name), reason) for name, reason in unused)


def _plan_path(work: Path, shard: str) -> Path:
    return work / f"{shard}.plan.json"


def _report_path(work: Path, shard: str) -> Path:
    return work / f"{shard}.json"


def _write_json(path: Path, value: object) -> None:
    with artifact.atomic_write(path) as temporary:
        temporary.write_text(
            json.dumps(value), encoding="utf-8"
        )  # json escapes to ASCII, also bytes that are not UTF-8
