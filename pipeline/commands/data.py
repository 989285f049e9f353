"""`vqvae2 data`: splits, classes, sizes and formats of the images of a run, and what is left out or doubtful."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline import data_page, params
from pipeline.checks.inputs import require_outside_source, require_pulled
from pipeline.compose import compose_settings
from stages.config import DatasetConfig
from stages.images import overview
from stages.images.count import format_count
from stages.images.listing import Listing, list_images
from stages.images.overview import Scan, quantiles
from stages.images.sources import open_source, printable
from stages.tracking.console import ConsoleReporter

CLASSES_SHOWN = 30  # lines of the table; --json has all
FILES_SHOWN = 5  # by name, of those that are rejected or copies
TITLE_WIDTH = 12  # columns


def show(overrides: Sequence[str], *, out: Path | None, sample: int, as_json: bool) -> int:
    """Print the overview of composed settings, or of params.yaml without overrides; return the exit status.

    With `out`, also write data.html there. With `sample`, read the headers of that many images only.
    """
    dataset = (compose_settings(overrides)[1] if overrides else params.load()).dataset
    path = Path(dataset.source)
    require_pulled(path)
    if out is not None:
        require_outside_source(out, path)
    listing = list_images(path, dataset.labels, validation_fraction=dataset.validation_fraction)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    source = open_source(path)
    images = overview.sample_images(listing.images, sample)
    with ConsoleReporter("data") as reporter:
        scan = overview.scan(
            source,
            images,
            dataset,
            find_copies=len(images) == len(listing.images),
            progress=lambda done, total: reporter.progress(done, total, "images", {}),
        )
    if as_json:
        print(json.dumps(to_json(dataset, listing, scan), indent=1, ensure_ascii=False))
    else:
        print("\n".join(to_text(dataset, listing, scan)))
    if out is not None:
        page = data_page.write(out, source, dataset, listing, facts(dataset, listing, scan))
        if not as_json:
            print(f"{'page':<{TITLE_WIDTH}}{page}")
    return 0


def to_json(dataset: DatasetConfig, listing: Listing, scan: Scan) -> dict[str, Any]:
    """Return the overview for programs."""
    sides = {"width": scan.widths, "height": scan.heights}
    return {
        "name": dataset.name,
        "source": dataset.source,
        "labels": dataset.labels,
        "image_size": dataset.image_size,
        "splits": overview.count_splits(listing),
        "classes": overview.count_classes(listing),
        "sizes": {
            name: dict(zip(("min", "median", "max"), quantiles(counts), strict=True))
            for name, counts in sides.items()
            if counts
        },
        "smaller_than_image_size": scan.smaller,
        "not_square": scan.not_square,
        "formats": dict(scan.formats.most_common()),
        "modes": dict(scan.modes.most_common()),
        "copies": scan.copies if scan.copies_checked else None,
        "copies_across_splits": scan.leaked if scan.copies_checked else None,
        "first_copies": [{"name": printable(name), "equals": printable(first)} for name, first in scan.first_copies],
        "checked": scan.checked,
        "rejected": scan.num_rejected,
        "first_rejected": [{"name": printable(name), "reason": reason} for name, reason in scan.rejected],
        "skipped": len(listing.skipped),
        "messages": listing.messages,
        "doubts": doubts(listing, scan),
    }


def to_text(dataset: DatasetConfig, listing: Listing, scan: Scan) -> Iterator[str]:
    """Yield the lines of the overview for people."""
    (title, text), *others = facts(dataset, listing, scan)
    yield f"{title:<{TITLE_WIDTH}}{text}"
    yield from _counts(listing)
    previous = ""
    for title, text in others:
        yield f"{title if title != previous else '':<{TITLE_WIDTH}}{text}"
        previous = title


def facts(dataset: DatasetConfig, listing: Listing, scan: Scan) -> list[tuple[str, str]]:
    """Return everything but the counts of splits and classes, as pairs of a title and a text."""
    labels = {"folders": "classes from folders", "none": "no classes"}.get(
        dataset.labels, f"classes from {dataset.labels}"
    )
    rows = [("dataset", f"{dataset.name}: {dataset.source}, {labels}")]
    checked = f" in {scan.checked} of {len(listing.images)} images" if scan.checked < len(listing.images) else ""
    if scan.widths:
        width, height = (" / ".join(map(str, quantiles(counts))) for counts in (scan.widths, scan.heights))
        rows.append(("sizes", f"width {width}, height {height} pixels (smallest / median / largest){checked}"))
    size = dataset.image_size
    conversions = [f"all are resized to {size} x {size}"]
    if scan.not_square:
        verb = {"crop": "cropped", "pad": "padded", "stretch": "stretched"}[dataset.resize_mode]
        conversions.append(f"{scan.not_square} are not square and are {verb}")
    if scan.smaller:
        conversions.append(f"{scan.smaller} are smaller and are enlarged")
    rows.append(("", "; ".join(conversions)) if scan.widths else ("sizes", "unknown: no image can be read"))
    rows.append(("formats", _most_common(scan.formats)))
    rows.append(("modes", _most_common(scan.modes)))
    if scan.copies_checked:
        leaked = f", {scan.leaked} of them a file of another split" if scan.leaked else ""
        rows.append(
            ("copies", format_count(scan.copies, "file equals another file", "files equal another file") + leaked)
        )
        rows += [
            ("copies", f"  {printable(name)} equals {printable(first)}")
            for name, first in scan.first_copies[:FILES_SHOWN]
        ]
    else:
        rows.append(("copies", "not checked; the stage shard counts images with equal pixels"))
    rows += [("note", message) for message in listing.messages]
    if scan.num_rejected:
        rows.append(
            ("rejected", format_count(scan.num_rejected, "image cannot be used:", "images cannot be used, such as:"))
        )
        rows += [("rejected", f"  {printable(name)}: {reason}") for name, reason in scan.rejected[:FILES_SHOWN]]
    rows += [("DOUBT", doubt) for doubt in doubts(listing, scan)]
    return rows


def doubts(listing: Listing, scan: Scan) -> list[str]:
    """Return the doubts about names, and those about contents."""
    texts = list(listing.doubts)
    if scan.leaked:
        files = format_count(scan.leaked, "file is a copy", "files are copies")
        texts.append(f"{files} of a file of another split.")
    if scan.num_rejected == scan.checked:
        texts.append("No image can be used.")
    return texts


def _counts(listing: Listing) -> Iterator[str]:
    """Yield a table of the images per split, and per class if there are classes."""
    splits = {split: count for split, count in overview.count_splits(listing).items() if count}
    classes = overview.count_classes(listing)
    rows = [(printable(name), counts) for name, counts in list(classes.items())[:CLASSES_SHOWN]]
    width = max([TITLE_WIDTH, *(len(name) + 2 for name, _ in rows)])
    yield ""
    yield f"{'class' if classes else '':<{width}}" + "".join(f"{split:>12}" for split in splits)
    for name, counts in rows:
        yield f"{name:<{width}}" + "".join(f"{counts[split]:>12}" for split in splits)
    if omitted := len(classes) - len(rows):
        yield f"and {format_count(omitted, 'class', 'classes')} more, which --json lists"
    yield f"{'all images':<{width}}" + "".join(f"{count:>12}" for count in splits.values())
    yield ""


def _most_common(counts: Any) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common()) or "unknown"
