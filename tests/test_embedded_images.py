"""The embedded images: every emoji has a class and a split, and no variant of it is in the other split."""

from collections import defaultdict
from pathlib import PurePosixPath

import pytest

from pipeline import params
from pipeline.compose import compose_params
from stages.evaluation.report import CLASSES_SHOWN
from stages.images.listing import Listing, list_images
from tests.command_line_project import ROOT

SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
JOINER, FEMALE, MALE = "200d", "2640", "2642"


@pytest.fixture(scope="module")
def listing() -> Listing:
    """List the images as the stage does by default."""
    dataset = params.check(compose_params([], ROOT / "conf"), ROOT / "conf").dataset
    return list_images(ROOT / dataset.source, dataset.labels, validation_fraction=dataset.validation_fraction)


def test_table_of_labels_has_every_image(listing: Listing):
    """The table in the archive names each image once, and the report of the demo shows all classes."""
    counts = [sum(image.split == split for image in listing.images) for split in ("train", "validation")]
    assert counts == [3114, 258]
    assert not listing.doubts and not listing.skipped
    assert {image.label for image in listing.images} == set(range(len(listing.classes)))
    assert len(listing.classes) <= CLASSES_SHOWN


def test_splits_are_those_of_the_folders(listing: Listing):
    """With `dataset.labels=folders`, the same images are in each split, in nine classes of Unicode."""
    assert all(PurePosixPath(image.member.name).parts[0] == image.split for image in listing.images)


def test_variants_of_an_emoji_are_in_one_split(listing: Listing):
    """Skin tones and signs of gender do not make another emoji."""
    splits = defaultdict(set)
    for image in listing.images:
        points = PurePosixPath(image.member.name).stem.split("-")
        splits[tuple(point for point in points if point not in {*SKIN_TONES, JOINER, FEMALE, MALE})].add(image.split)
    assert [points for points, names in splits.items() if len(names) > 1] == []
