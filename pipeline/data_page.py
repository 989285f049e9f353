"""HTML page of `vqvae2 data`: the counts of splits and classes, the facts, and images of each class.

The page is one file: images are embedded, and nothing is requested.
"""

import base64
from collections.abc import Sequence
from pathlib import Path

from stages.config import DatasetConfig
from stages.formats import html_page
from stages.images import overview
from stages.images.contact_sheet import contact_sheet
from stages.images.listing import Listing
from stages.images.sources import Source, printable

TEMPLATE = Path(__file__).with_name("data_page.html.j2")
FILE = "data.html"
MAX_CLASSES = 60  # with images; the table has all
IMAGES_PER_CLASS = 16
IMAGES_WITHOUT_CLASSES = 64
COLUMNS = 8
MAX_SIDE = 96  # pixels of an image on the page


def write(
    folder: Path, source: Source, dataset: DatasetConfig, listing: Listing, facts: Sequence[tuple[str, str]]
) -> Path:
    """Write the page to a folder; return its path."""
    classes = overview.count_classes(listing)
    names = list(classes)[:MAX_CLASSES] or [overview.UNLABELED]
    sheets = overview.examples(
        source,
        listing,
        dataset,
        classes=names,
        count=IMAGES_PER_CLASS if classes else IMAGES_WITHOUT_CLASSES,
        side=min(dataset.image_size, MAX_SIDE),
    )
    page = html_page.render(
        TEMPLATE,
        name=dataset.name,
        splits={split: count for split, count in overview.count_splits(listing).items() if count},
        classes={printable(name): counts for name, counts in classes.items()},
        facts=[(title, text) for title, text in facts if title != "DOUBT"],
        doubts=[text for title, text in facts if title == "DOUBT"],
        sheets=[
            (printable(name), base64.b64encode(contact_sheet(images, min(COLUMNS, len(images)))).decode())
            for name, images in sheets
        ],
        classes_without_images=max(0, len(classes) - MAX_CLASSES),
    )
    path = folder / FILE
    path.write_text(page, encoding="utf-8")
    return path
