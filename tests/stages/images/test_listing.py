"""Tests of listing: splits and classes from folder names or a CSV."""

import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from stages.errors import UserError
from stages.images import listing
from stages.images.listing import Listing, check_source, list_images
from stages.images.sources import FolderSource, UnreadableFile


def make(path: Path, *names: str) -> Path:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(name.encode("utf-8", "surrogateescape"))
    return path


def listed(path: Path, labels: str = "folders", validation_fraction: float = 0.0) -> Listing:
    return list_images(path, labels, validation_fraction=validation_fraction)


def by_name(listing: Listing) -> dict[str, tuple[str, str | None]]:
    """Return split and class by name."""
    return {
        image.member.name: (image.split, listing.classes[image.label] if image.label >= 0 else None)
        for image in listing.images
    }


def refusal(path: Path, labels: str = "folders") -> str:
    with pytest.raises(UserError) as caught:
        listed(path, labels)
    assert caught.value.fix
    return str(caught.value)


def test_class_folders_are_classes(tmp_path):
    """Each folder is a class, in alphabetical order; files in its subfolders belong to it."""
    path = make(tmp_path, "dog/1.png", "cat/1.png", "cat/persian/2.PNG", "LICENSE.txt")
    listing = listed(path)
    assert listing.classes == ("cat", "dog")
    assert by_name(listing) == {
        "dog/1.png": ("train", "dog"),
        "cat/1.png": ("train", "cat"),
        "cat/persian/2.PNG": ("train", "cat"),
    }
    assert listing.messages == ("1 file that is not an image is ignored: .txt 1.",)


def test_split_folders_are_splits(tmp_path):
    """train, val, valid and test are accepted in any case, with or without class folders inside."""
    path = make(tmp_path, "Train/cat/1.png", "val/cat/2.png", "test/dog/3.png")
    listing = listed(path)
    assert by_name(listing) == {
        "Train/cat/1.png": ("train", "cat"),
        "val/cat/2.png": ("validation", "cat"),
        "test/dog/3.png": ("test", "dog"),
    }
    assert listing.doubts == ("Classes without a training image: dog.",)
    flat = listed(make(tmp_path / "flat", "train/1.png", "valid/2.png"))
    assert by_name(flat) == {"train/1.png": ("train", None), "valid/2.png": ("validation", None)}


def test_a_flat_folder_has_no_labels(tmp_path):
    """The label is -1, and a message is shown; with labels: none, folders are not classes."""
    listing = listed(make(tmp_path / "flat", "1.png", "2.png"))
    assert listing.classes == () and {image.label for image in listing.images} == {-1}
    assert "There are no class folders: the images have no labels." in listing.messages
    unlabelled = listed(make(tmp_path / "deep", "a/1.png", "b/2.png", "3.png"), labels="none")
    assert unlabelled.classes == () and len(unlabelled.images) == 3 and unlabelled.messages == ()


@pytest.mark.parametrize("wrapper", ["pets/", "pets/set/"])
def test_a_single_folder_around_the_class_folders_is_skipped(tmp_path, wrapper):
    """It is accepted with a message."""
    path = make(tmp_path, *(wrapper + name for name in ("train/cat/1.png", "train/dog/2.png", "val/cat/3.png")))
    listing = listed(path)
    assert listing.classes == ("cat", "dog") and by_name(listing)[f"{wrapper}val/cat/3.png"] == ("validation", "cat")
    assert len(listing.messages) == wrapper.count("/") and "is taken as the dataset" in listing.messages[0]


def test_images_outside_class_or_split_folders_are_skipped(tmp_path):
    """They have no class or no split. A message and the list of skipped files name them."""
    listing = listed(make(tmp_path / "a", "cat/1.png", "loose.png"))
    assert listing.skipped == (("loose.png", "outside the class folders"),) and len(listing.images) == 1
    assert "1 image is skipped: outside the class folders." in listing.messages
    listing = listed(make(tmp_path / "b", "train/1.png", "val/2.png", "loose.png"), labels="none")
    assert listing.skipped == (("loose.png", "outside the split folders"),)


def test_split_folders_beside_other_folders_are_rejected(tmp_path):
    """Two split folders beside others are ambiguous; a single one is a class, such as trains among vehicles."""
    assert "extra" in refusal(make(tmp_path / "a", "train/cat/1.png", "val/cat/2.png", "extra/cat/3.png"))
    assert listed(make(tmp_path / "b", "train/1.png", "car/2.png")).classes == ("car", "train")


def test_validation_images_are_held_out_by_a_hash_of_the_name(tmp_path):
    """The stated fraction is held out, never all images, and adding an image moves at most one other image."""
    names = [f"cat/{number}.png" for number in range(100)]
    listing = listed(make(tmp_path / "a", *names), validation_fraction=0.1)
    held_out = {name for name, (split, _) in by_name(listing).items() if split == "validation"}
    assert len(held_out) == 10 and by_name(listed(tmp_path / "a", validation_fraction=0.1)) == by_name(listing)
    more = listed(make(tmp_path / "a", "cat/new.png"), validation_fraction=0.1)
    assert len(held_out - {name for name, (split, _) in by_name(more).items() if split == "validation"}) <= 1
    single = listed(make(tmp_path / "one", "1.png"), validation_fraction=0.5)
    assert by_name(single) == {"1.png": ("train", None)} and "a single training image" in single.messages[-1]
    two = listed(make(tmp_path / "two", "1.png", "2.png"), validation_fraction=0.01)
    assert sorted(split for split, _ in by_name(two).values()) == ["train", "validation"]
    named = listed(
        make(tmp_path / "named", *(f"train/{n}.png" for n in range(9)), "val/9.png"), validation_fraction=0.5
    )
    assert sum(split == "validation" for split, _ in by_name(named).values()) == 1


def test_the_order_mixes_classes_and_is_independent_of_the_disk(tmp_path):
    """Neighbouring images differ in class about as often as in a random order."""
    names = [f"{label}/{number}.png" for label in ("cat", "dog") for number in range(100)]
    forward = listed(make(tmp_path / "a", *names))
    backward = listed(make(tmp_path / "b", *reversed(names)))
    assert [image.member.name for image in forward.images] == [image.member.name for image in backward.images]
    labels = [image.label for image in forward.images]
    assert 70 < sum(label != next_label for label, next_label in pairwise(labels)) < 130


def test_one_image_of_one_class_is_accepted(tmp_path):
    """A message notes the single class."""
    listing = listed(make(tmp_path, "cat/1.png"), validation_fraction=0.05)
    assert by_name(listing) == {"cat/1.png": ("train", "cat")}
    assert "All images have one class, cat." in listing.messages


def test_class_names_may_hold_any_characters(tmp_path):
    """NFC and NFD are one class, and 10,000 classes are accepted."""
    path = make(tmp_path, "caf\u00e9/1.png", "cafe\u0301/2.png", "<script>/4.png", "\U0001f600/5.png")
    assert listed(path).classes == ("<script>", "caf\u00e9", "\U0001f600")
    rows = "".join(f"{number}.png,c{number:05d}\n" for number in range(10_000))
    many = make(tmp_path / "many", *(f"{number}.png" for number in range(10_000)))
    (many / "labels.csv").write_text("path,label\n" + rows)
    listing = listed(many, "labels.csv")
    assert len(listing.classes) == 10_000 and by_name(listing)["77.png"] == ("train", "c00077")


def test_a_class_folder_whose_name_is_not_utf8_is_rejected(tmp_path):
    """Its bytes would be guessed; a file name may have any bytes."""
    assert "not UTF-8: M\\udcfcller" in refusal(make(tmp_path / "a", "M\udcfcller/1.png", "b/2.png"))
    path = make(tmp_path / "b", "a/\udcfc.png")
    assert listed(path).classes == ("a",)
    with pytest.raises(UserError, match="not UTF-8, so DVC cannot track it"):
        check_source(path, "folders")


def test_a_csv_outside_the_source_is_rejected(tmp_path):
    """DVC would not track its changes."""
    path = make(tmp_path / "images", "1.png")
    (tmp_path / "labels.csv").write_text("path,label\n1.png,a")
    for labels in ("labels.csv", "../labels.csv", str(tmp_path / "labels.csv"), "folder", "", "/", "a\0b", "x" * 5000):
        assert "into the source" in refusal(path, labels)
        with pytest.raises(UserError, match="inside the source"):
            check_source(path, labels)


def test_a_source_without_images_is_rejected(tmp_path):
    """The error shows the path and the expected layout."""
    (tmp_path / "empty").mkdir()
    make(tmp_path / "texts", "a/1.txt", "b/Thumbs.db", "c/.hidden.png")
    for name in ("empty", "texts"):
        assert "has no images" in refusal(tmp_path / name) and "cat/1.png" in refusal(tmp_path / name)
        with pytest.raises(UserError, match="no images"):
            check_source(tmp_path / name, "folders")
    with pytest.raises(UserError, match="does not exist"):
        check_source(tmp_path / "missing", "folders")
    assert "has no training images" in refusal(make(tmp_path / "val", "val/1.png", "test/2.png"))
    check_source(make(tmp_path / "fine", "1.png"), "folders")


def test_the_quick_check_reports_what_listing_would(tmp_path, monkeypatch):
    """Folders and labels are checked before a run starts; of many files, only the header of the labels."""
    path = make(tmp_path, "1.png", "2.png", "3.png")
    (path / "labels.csv").write_text("path,label\n1.png,a\nmissing.png,b\n")
    with pytest.raises(UserError, match="Line 3 of the labels"):
        check_source(path, "labels.csv")
    monkeypatch.setattr(listing, "CHECKED_FILES", 2)
    for labels in ("labels.csv", "absent.csv", "", "a\0b", "x" * 5000):  # one table per split folder has any name
        check_source(path, labels)
    (path / "labels.csv").write_text("path,width\n1.png,a\n")
    archive = Path(shutil.make_archive(str(tmp_path) + "-images", "zip", path))
    for source in (path, archive):
        with pytest.raises(UserError, match="one of classes, got the columns path, width"):
            check_source(source, "labels.csv")


@pytest.mark.parametrize(("limit", "value"), [("CHECKED_FILES", 2), ("_CHECKED_BYTES", 1000)])
def test_the_quick_check_of_a_tar_is_bounded(tmp_path, monkeypatch, limit, value):
    """It reads on for an image up to a number of files and of bytes; without more files, there is no image."""
    make(tmp_path / "texts", "1.txt", "2.txt", "3.txt")
    archive = Path(shutil.make_archive(str(tmp_path / "texts"), "gztar", tmp_path / "texts"))
    with pytest.raises(UserError, match="has no images"):
        check_source(archive, "folders")
    monkeypatch.setattr(listing, limit, value)
    check_source(archive, "folders")


def test_listing_imports_no_heavy_library():
    """check_source runs before a command imports anything else."""
    code = "import sys, stages.images.listing; print({'torch', 'ray', 'pyarrow', 'numpy', 'PIL'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_an_unreadable_csv_is_named(tmp_path, monkeypatch):
    """The CSV may change after it was listed."""
    make(tmp_path, "a.png")
    (tmp_path / "labels.csv").write_text("path,label\na.png,cat\n")

    def read(source, member):
        raise UnreadableFile("the file changed after it was listed")

    monkeypatch.setattr(FolderSource, "read", read)
    message = refusal(tmp_path, "labels.csv")
    assert "The labels cannot be read: the file changed after it was listed." in message
    assert str(tmp_path / "labels.csv") in message
