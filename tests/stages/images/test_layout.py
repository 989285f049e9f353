"""Tests of folder layouts: the splits and classes that folder names have in datasets as people have them."""

from pathlib import Path

import pytest

from stages.errors import UserError
from stages.images.layout import FolderLayout, read_folders, split_folders, split_of
from stages.images.sources import Member

SOURCE = Path("images.zip")


def read(*names: str, labelled: bool = True) -> FolderLayout:
    return read_folders([Member(name, 0, 1) for name in names], labelled, SOURCE)


def by_name(layout: FolderLayout) -> dict[str, tuple[str, str | None]]:
    """Return split and class by name."""
    return {candidate.member.name: (candidate.split, candidate.label) for candidate in layout.candidates}


@pytest.mark.parametrize(
    ("split", "names"),
    [
        ("train", "train Training TRAIN train2017 train_images train-set images_train trainset"),
        ("validation", "val valid Validation dev DEV eval evaluation val2017 valid_data"),
        ("test", "test Testing test-images testset"),
        ("", "trains device value tests training_day cat 2017 train1 latest"),
    ],
)
def test_the_usual_names_of_splits_are_known_in_any_case(split, names):
    """Also with a year, and with words such as images or set; other names are no splits."""
    assert {name: split_of(name) for name in names.split()} == dict.fromkeys(names.split(), split)


def test_dev_folders_are_validation_images():
    """Split folders that share their classes do not become classes."""
    layout = read("train/a/1.png", "train/b/2.png", "dev/a/3.png", "dev/b/4.png")
    assert by_name(layout)["dev/b/4.png"] == ("validation", "b") and by_name(layout)["train/a/1.png"] == ("train", "a")
    assert not layout.doubts


@pytest.mark.parametrize("wrapper", ["images", "Images", "JPEGImages", "data"])
def test_split_folders_below_a_folder_of_images_are_splits(wrapper):
    """Annotations beside it are left out, and listed if they are images, such as masks."""
    layout = read(f"{wrapper}/train/1.png", f"{wrapper}/val/2.png")
    assert by_name(layout) == {f"{wrapper}/train/1.png": ("train", None), f"{wrapper}/val/2.png": ("validation", None)}
    layout = read(f"{wrapper}/train/1.png", f"{wrapper}/val/2.png", "annotations/train/1.png", "masks/val/2.png")
    assert set(by_name(layout)) == {f"{wrapper}/train/1.png", f"{wrapper}/val/2.png"}
    assert dict(layout.skipped) == dict.fromkeys(
        ("annotations/train/1.png", "masks/val/2.png"), "in a folder of annotations"
    )


def test_images_folders_in_split_folders_are_no_classes():
    """As exported for object detection; class folders may follow below."""
    layout = read("train/images/1.png", "valid/images/2.png", "valid/masks/2.png")
    assert by_name(layout) == {"train/images/1.png": ("train", None), "valid/images/2.png": ("validation", None)}
    layout = read("train/images/cat/1.png", "test/images/dog/2.png")
    assert by_name(layout)["test/images/dog/2.png"] == ("test", "dog")


def test_split_folders_in_class_folders_are_splits():
    """Classes are the folders above; ground truth beside the splits is left out."""
    layout = read(
        *("bottle/train/good/1.png", "bottle/test/broken/2.png", "bottle/ground_truth/broken/2.png"),
        *("cable/train/good/1.png", "cable/test/bent/2.png"),
    )
    assert by_name(layout) == {
        "bottle/train/good/1.png": ("train", "bottle"),
        "bottle/test/broken/2.png": ("test", "bottle"),
        "cable/train/good/1.png": ("train", "cable"),
        "cable/test/bent/2.png": ("test", "cable"),
    }
    assert layout.skipped == [("bottle/ground_truth/broken/2.png", "in a folder of annotations")]


@pytest.mark.parametrize("outside", ["preview.png", "cat/cover.png"])
@pytest.mark.parametrize("folders", [("cat", "dog"), ("animals",), ("images",)])
def test_images_outside_the_split_folders_of_a_folder_are_skipped(outside, folders):
    """Test images stay test images, whatever lies beside the split folders or the folders above them."""
    outside = outside.replace("cat", folders[0])
    files = [f"{folder}/{split}/{number}.png" for folder in folders for number, split in enumerate(("train", "test"))]
    layout = read(*files, outside)
    assert {name: split for name, (split, _) in by_name(layout).items()} == {name: name.split("/")[1] for name in files}
    assert {label for _, label in by_name(layout).values()} == ({"cat", "dog"} if len(folders) > 1 else {None})
    assert layout.skipped == [(outside, "outside the split folders")] and not layout.doubts


def test_a_dataset_folder_beside_an_image_holds_the_classes():
    """A preview or a cover does not turn the folder of the dataset into a class."""
    layout = read("animals/train/cat/1.png", "animals/test/dog/2.png", "animals/cover.png", "preview.png")
    assert by_name(layout) == {
        "animals/train/cat/1.png": ("train", "cat"),
        "animals/test/dog/2.png": ("test", "dog"),
    }


@pytest.mark.parametrize(
    "names",
    [
        ("train/cat/1.png", "val/cat/2.png", "extra/cat/3.png"),
        ("cat/train/1.png", "cat/val/2.png", "cat/extra/3.png", "dog/train/4.png", "dog/val/5.png"),
        ("pictures_a/train/1.png", "pictures_a/val/2.png", "extra/3.png"),
    ],
)
def test_split_folders_beside_other_folders_are_rejected(names):
    """The other folders would be of no split; the error names them."""
    with pytest.raises(UserError, match=r"train, val\).* beside other folders \(extra\)"):
        read(*names)


def test_a_class_that_is_named_like_a_split_is_doubted():
    """A single split folder beside others is a class, such as trains among vehicles."""
    layout = read("train/1.png", "car/2.png")
    assert by_name(layout) == {"train/1.png": ("", "train"), "car/2.png": ("", "car")}
    assert layout.doubts == [
        "The folder train is used as a class, although it is named like the train images: it is beside or inside of "
        "other folders."
    ]
    assert "named like the test images" in read("train/cat/1.png", "train/test/2.png", "val/cat/3.png").doubts[0]


def test_classes_that_share_their_subfolders_are_doubted():
    """They look like splits of unusual names."""
    (doubt,) = read("part1/a/1.png", "part1/b/2.png", "part2/a/3.png", "part2/b/4.png").doubts
    assert doubt.startswith("The folders part1, part2 are used as classes, although they share the subfolders a, b.")
    assert not read("cat/persian/1.png", "cat/siamese/2.png", "dog/poodle/3.png", "dog/collie/4.png").doubts


def test_classes_that_are_named_like_annotations_are_doubted():
    """Masks beside other classes may be no images to train on."""
    assert "(masks)" not in read("cat/1.png", "dog/2.png").doubts
    assert read("cat/1.png", "masks/2.png").doubts == [
        "The folders masks are used as classes, although annotations have such names."
    ]


def test_a_single_split_folder_is_doubted():
    """It may be an incomplete copy."""
    layout = read("train/cat/1.png", "train/dog/2.png")
    assert by_name(layout)["train/cat/1.png"] == ("train", "cat")
    assert layout.doubts == ["The only split folder is train; the source has no validation or test images."]


def test_several_folders_of_one_split_are_doubted():
    """They may be different sets."""
    assert read("train/1.png", "val/2.png", "dev/3.png").doubts == [
        "The folders dev, val are all used as validation images."
    ]


def test_without_labels_folders_are_no_classes():
    """Split folders still count."""
    assert by_name(read("a/1.png", "b/2.png", labelled=False)) == {"a/1.png": ("", None), "b/2.png": ("", None)}
    assert by_name(read("train/a/1.png", "dev/b/2.png", labelled=False))["dev/b/2.png"] == ("validation", None)


def test_split_folders_of_names_below_common_folders():
    """All names must be in split folders."""
    assert split_folders(["data/train/1.png", "data/dev/2.png"]) == {
        "data/train/1.png": "train",
        "data/dev/2.png": "validation",
    }
    assert split_folders(["train/1.png", "extra/2.png"]) == {} == split_folders(["1.png"])
