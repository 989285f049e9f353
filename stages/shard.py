"""Turn a source of images into shards.

reads   source   a folder, zip or tar of images    formats/sources.py, listing.py, images.py
writes  out      image shards and their index      formats/shards.py
        metrics  counts, for DVC

Each shard is a part that one worker writes by itself, under names that the listing decides: the same source and
settings give the same bytes, on however many workers, and a rerun keeps the shards that are finished.
"""

import csv
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import ImageColor

from stages.config import DatasetConfig
from stages.errors import UserError
from stages.formats import artifact
from stages.formats.shards import INDEX, KIND, REJECTED, Encoded, Row, write_index, write_shard
from stages.images.decode import RejectedImage, decode, encode
from stages.images.listing import SPLITS, Entry, Listing, find
from stages.images.sources import Member, UnreadableFile, open_source, printable
from stages.mapping.parts import map_parts
from stages.runtime.context import StageContext

_KEY_DIGITS = 9
_NUMBERS = ("rejected", "left_out", "duplicates", "leaked")
_NAMED = 20  # rejected files in the message that stops the stage


def run(source: Path, out: Path, metrics: Path, *, dataset: DatasetConfig, context: StageContext) -> None:
    """Make the shards; stop with the names of the files if too many cannot be used."""
    try:
        ImageColor.getrgb(dataset.background)
    except ValueError:
        what = f"dataset.background is {dataset.background!r}, which is no colour."
        raise UserError(what, where="params.yaml", fix="Use a name or #rrggbb, such as #ffffff.", code=2) from None
    listing = find(source, dataset.labels, validation_fraction=dataset.validation_fraction)
    for note in listing.notes:
        context.reporter.note(note)
    work = context.work / "parts"
    parts = _plan(listing, dataset, work)
    map_parts(WriteShard, (source.absolute(), work.absolute(), dataset), parts, context=context, unit="images")

    finished = [json.loads(_report(work, part["shard"]).read_text("utf-8")) for part in parts]
    rejected = [(name, reason) for report in finished for name, reason in report["rejected"]]
    _stop_if_too_many(rejected, len(listing.entries), source, dataset)
    rows = [[Row(*row) for row in report["rows"]] for report in finished]
    counts = _counts(listing, rows, rejected, finished)
    for note in _warnings(counts):
        context.reporter.note(note)
    if not counts["images"]["train"]:
        name, reason = rejected[0]
        fix = f"Mend the training images; the first one, {printable(name)}: {reason}."
        raise UserError("No training image could be read.", where=source, fix=fix, code=4)

    settings = {name: value for name, value in asdict(dataset).items() if name != "source"}
    meta = {"image_size": dataset.image_size, "classes": listing.classes, "settings": settings, **counts}
    with artifact.commit_folder(out, KIND, meta) as folder:
        for shard in [shard_rows[0].shard for shard_rows in rows if shard_rows]:
            artifact.link_or_copy(work / shard, folder / shard)
        write_index(folder / INDEX, filter(None, rows))
        with (folder / REJECTED).open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(("name", "reason"))
            table.writerows((printable(name), reason) for name, reason in (*listing.left_out, *rejected))
    metrics.parent.mkdir(parents=True, exist_ok=True)
    numbers = {"images": counts["images"], "classes": len(listing.classes)} | {name: counts[name] for name in _NUMBERS}
    metrics.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


class WriteShard:
    """A worker's own view of the source; writes one shard per call."""

    def __init__(self, source: Path, work: Path, dataset: DatasetConfig):
        self.source, self.work, self.dataset = open_source(source), work, dataset

    def __call__(self, part: Mapping[str, Any]) -> dict[str, Any]:
        shard = part["shard"]
        report = self._finished(shard)
        if report is None:
            report = self._write(shard)
        return {"images": len(report["rows"]), "rejected": len(report["rejected"])}

    def _finished(self, shard: str) -> dict[str, Any] | None:
        try:
            report = json.loads(_report(self.work, shard).read_text("utf-8"))
            plan, whole = artifact.sha256(_plan_file(self.work, shard)), artifact.sha256(self.work / shard)
            return report if (report["plan"], report["sha256"]) == (plan, whole) else None
        except (OSError, ValueError, KeyError):
            return None

    def _write(self, shard: str) -> dict[str, Any]:
        plan = json.loads(_plan_file(self.work, shard).read_text("utf-8"))
        images: dict[str, Encoded] = {}
        rejected: list[tuple[str, str]] = []
        notes: Counter[str] = Counter()
        # In the order in which they lie, so that a compressed tar is read through once; kept in the order of keys.
        for key, member, label in sorted(plan["entries"], key=lambda entry: entry[1][1]):
            member = Member(*member)
            try:
                picture = decode(self.source.read(member), self.dataset)
            except (UnreadableFile, RejectedImage) as error:
                rejected.append((member.name, printable(str(error))))
                continue
            notes.update(picture.notes)
            origin = {"name": member.name} | ({"label": plan["classes"][str(label)]} if label >= 0 else {})
            extension = "png" if self.dataset.image_format == "png" else "jpg"
            images[key] = Encoded(key, encode(picture.pixels, self.dataset), extension, label, origin)
        temporary = self.work / f"{shard}.writing"
        kept = [images[key] for key in sorted(images)]
        places = write_shard(temporary, kept)
        rows = [
            Row(
                image.key,
                plan["split"],
                image.label,
                shard,
                *places[image.key],
                hashlib.sha256(image.data).hexdigest(),
                printable(image.origin["name"]),
            )
            for image in kept
        ]
        report = {
            "plan": artifact.sha256(_plan_file(self.work, shard)),
            "sha256": artifact.sha256(temporary),
            "rows": rows,
            "rejected": sorted(rejected),
            "notes": dict(sorted(notes.items())),
        }
        temporary.replace(self.work / shard)
        _write_json(_report(self.work, shard), report)
        return report


def _plan(listing: Listing, dataset: DatasetConfig, work: Path) -> list[dict[str, Any]]:
    """Write down which images make which shard; return the parts, which only name the shards."""
    work.mkdir(parents=True, exist_ok=True)
    parts = []
    for number, split, images in _cut(listing.entries, dataset.images_per_shard):
        shard = f"{split}-{number:05d}.tar"
        entries = [(f"{position:0{_KEY_DIGITS}d}", entry.member, entry.label) for position, entry in images]
        classes = {str(label): listing.classes[label] for _, _, label in entries if label >= 0}
        _write_json(_plan_file(work, shard), {"split": split, "classes": classes, "entries": entries})
        parts.append({"shard": shard, "weight": len(entries)})
    return parts


def _cut(entries: tuple[Entry, ...], size: int) -> Iterator[tuple[int, str, list[tuple[int, Entry]]]]:
    numbered = list(enumerate(entries))
    for split in SPLITS:
        chosen = [pair for pair in numbered if pair[1].split == split]
        for number, start in enumerate(range(0, len(chosen), size)):
            yield number, split, chosen[start : start + size]


def _counts(
    listing: Listing, rows: list[list[Row]], rejected: list[tuple[str, str]], reports: list[dict[str, Any]]
) -> dict[str, Any]:
    """Count images per split and class, what was done to them, and equal pictures within and across splits."""
    images = Counter(row.split for shard in rows for row in shard)
    labels = Counter((row.split, row.label) for shard in rows for row in shard)
    splits_of: dict[str, Counter[str]] = defaultdict(Counter)
    for row in (row for shard in rows for row in shard):
        splits_of[row.sha256][row.split] += 1
    notes: Counter[str] = Counter()
    for report in reports:
        notes.update(report["notes"])
    return {
        "images": {split: images[split] for split in SPLITS},
        "per_class": {
            split: {name: labels[split, label] for label, name in enumerate(listing.classes)}
            for split in SPLITS
            if images[split] and listing.classes
        },
        "rejected": len(rejected),
        "left_out": len(listing.left_out),
        "duplicates": sum(found.total() - 1 for found in splits_of.values()),
        "leaked": sum(found["validation"] for found in splits_of.values() if found["train"]),
        "conversions": dict(sorted(notes.items())),
    }


def _warnings(counts: Mapping[str, Any]) -> Iterator[str]:
    for note, count in counts["conversions"].items():
        yield f"{count} images: {note}."
    if counts["rejected"]:
        yield f"{counts['rejected']} images could not be used; {REJECTED} says why."
    if counts["leaked"]:
        yield f"LEAK: {counts['leaked']} validation images equal a training image, pixel for pixel."
    if counts["duplicates"]:
        yield f"{counts['duplicates']} images repeat another one, pixel for pixel."


def _stop_if_too_many(rejected: list[tuple[str, str]], images: int, source: Path, dataset: DatasetConfig) -> None:
    if len(rejected) <= images * dataset.max_rejected_fraction:
        return
    named = "".join(f"\n    {printable(name)}: {reason}" for name, reason in rejected[:_NAMED])
    more = f"\n    and {len(rejected) - _NAMED} more" if len(rejected) > _NAMED else ""
    raise UserError(
        f"{len(rejected)} of {images} images cannot be used:{named}{more}",
        where=source,
        fix=f"Mend or remove them, or raise dataset.max_rejected_fraction, which is {dataset.max_rejected_fraction}.",
        code=4,
    )


def _plan_file(work: Path, shard: str) -> Path:
    return work / f"{shard}.plan.json"


def _report(work: Path, shard: str) -> Path:
    return work / f"{shard}.json"


def _write_json(path: Path, value: object) -> None:
    with artifact.atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value), encoding="utf-8")  # ASCII: names with stray bytes survive
