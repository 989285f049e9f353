"""Splits and classes, read off names or a table."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from stages.errors import UserError
from stages.images.listing import Listing, check_source, find
from stages.images.sources import FolderSource, UnreadableFile


def make(path: Path, *names: str) -> Path:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(name.encode("utf-8", "surrogateescape"))
    return path


def listed(path: Path, labels: str = "folders", validation_fraction: float = 0.0) -> Listing:
    return find(path, labels, validation_fraction=validation_fraction)


def by_name(listing: Listing) -> dict[str, tuple[str, str | None]]:
    """Name -> split and class."""
    return {
        entry.member.name: (entry.split, listing.classes[entry.label] if entry.label >= 0 else None)
        for entry in listing.entries
    }


def refusal(path: Path, labels: str = "folders") -> str:
    with pytest.raises(UserError) as caught:
        listed(path, labels)
    assert caught.value.fix
    return str(caught.value)


def test_class_folders_give_classes(tmp_path):
    """One class per folder, in alphabetical order; what lies deeper belongs to it."""
    path = make(tmp_path, "dog/1.png", "cat/1.png", "cat/persian/2.PNG", "LICENSE.txt")
    listing = listed(path)
    assert listing.classes == ("cat", "dog")
    assert by_name(listing) == {
        "dog/1.png": ("train", "dog"),
        "cat/1.png": ("train", "cat"),
        "cat/persian/2.PNG": ("train", "cat"),
    }
    assert listing.notes == ("1 files that are no pictures are passed over: .txt 1.",)


def test_split_folders_give_splits(tmp_path):
    """train, val, validation, valid and test are understood in any case, with classes below or without."""
    path = make(tmp_path, "Train/cat/1.png", "val/cat/2.png", "test/dog/3.png")
    listing = listed(path)
    assert by_name(listing) == {
        "Train/cat/1.png": ("train", "cat"),
        "val/cat/2.png": ("validation", "cat"),
        "test/dog/3.png": ("test", "dog"),
    }
    assert "Classes without a training image: dog." in listing.notes
    flat = listed(make(tmp_path / "flat", "train/1.png", "valid/2.png"))
    assert by_name(flat) == {"train/1.png": ("train", None), "valid/2.png": ("validation", None)}


def test_a_flat_folder_has_no_labels_and_says_so(tmp_path):
    """No class list, label -1, a note; with labels none, folders are only folders."""
    listing = listed(make(tmp_path / "flat", "1.png", "2.png"))
    assert listing.classes == () and {entry.label for entry in listing.entries} == {-1}
    assert "There are no class folders: the images have no labels." in listing.notes
    unlabelled = listed(make(tmp_path / "deep", "a/1.png", "b/2.png", "3.png"), labels="none")
    assert unlabelled.classes == () and len(unlabelled.entries) == 3 and unlabelled.notes == ()


@pytest.mark.parametrize("wrapper", ["data/", "data/set/"])
def test_the_folder_around_the_class_folders_may_be_given(tmp_path, wrapper):
    """The common slip: it is accepted, with a note."""
    path = make(tmp_path, *(wrapper + name for name in ("train/cat/1.png", "train/dog/2.png", "val/cat/3.png")))
    listing = listed(path)
    assert listing.classes == ("cat", "dog") and by_name(listing)[f"{wrapper}val/cat/3.png"] == ("validation", "cat")
    assert len(listing.notes) == wrapper.count("/") and "is taken for the data set" in listing.notes[0]


def test_loose_images_beside_class_folders_are_left_out_and_said_so(tmp_path):
    """They have no class; so have images beside split folders no split."""
    listing = listed(make(tmp_path / "a", "cat/1.png", "loose.png"))
    assert listing.left_out == (("loose.png", "outside of the class folders"),) and len(listing.entries) == 1
    assert "1 images outside of the class folders are left out." in listing.notes
    listing = listed(make(tmp_path / "b", "train/1.png", "val/2.png", "loose.png"), labels="none")
    assert listing.left_out == (("loose.png", "outside of the split folders"),)


def test_split_folders_beside_others_are_refused(tmp_path):
    """Training on a class called train would be no help; a class of trains among vehicles is fine."""
    assert "extra" in refusal(make(tmp_path / "a", "train/cat/1.png", "val/cat/2.png", "extra/cat/3.png"))
    assert listed(make(tmp_path / "b", "train/1.png", "car/2.png")).classes == ("car", "train")


def test_validation_images_are_held_out_by_a_hash_of_the_name(tmp_path):
    """Where nobody named any: the stated fraction, the same each time, never all; adding images moves few."""
    names = [f"cat/{number}.png" for number in range(100)]
    listing = listed(make(tmp_path / "a", *names), validation_fraction=0.1)
    held_out = {name for name, (split, _) in by_name(listing).items() if split == "validation"}
    assert len(held_out) == 10 and by_name(listed(tmp_path / "a", validation_fraction=0.1)) == by_name(listing)
    more = listed(make(tmp_path / "a", "cat/new.png"), validation_fraction=0.1)
    assert len(held_out - {name for name, (split, _) in by_name(more).items() if split == "validation"}) <= 1
    assert by_name(listed(make(tmp_path / "one", "1.png"), validation_fraction=0.5)) == {"1.png": ("train", None)}
    two = listed(make(tmp_path / "two", "1.png", "2.png"), validation_fraction=0.01)
    assert sorted(split for split, _ in by_name(two).values()) == ["train", "validation"]
    named = listed(
        make(tmp_path / "named", *(f"train/{n}.png" for n in range(9)), "val/9.png"), validation_fraction=0.5
    )
    assert sum(split == "validation" for split, _ in by_name(named).values()) == 1


def test_the_order_mixes_classes_and_does_not_depend_on_the_disk(tmp_path):
    """By a hash of the name: neighbours are of different classes about as often as chance has it."""
    names = [f"{label}/{number}.png" for label in ("cat", "dog") for number in range(100)]
    forth = listed(make(tmp_path / "a", *names))
    back = listed(make(tmp_path / "b", *reversed(names)))
    assert [entry.member.name for entry in forth.entries] == [entry.member.name for entry in back.entries]
    labels = [entry.label for entry in forth.entries]
    assert 70 < sum(one != two for one, two in pairwise(labels)) < 130


def test_one_image_and_one_class_are_enough(tmp_path):
    """One class is noted."""
    listing = listed(make(tmp_path, "cat/1.png"), validation_fraction=0.05)
    assert by_name(listing) == {"cat/1.png": ("train", "cat")}
    assert "All images are of one class, cat." in listing.notes


def test_class_names_of_any_kind_survive(tmp_path):
    """NFC and NFD are one class; stray bytes are escaped; ten thousand classes are no trouble."""
    path = make(tmp_path, "caf\u00e9/1.png", "cafe\u0301/2.png", "\udcff/3.png", "<script>/4.png", "\U0001f600/5.png")
    assert listed(path).classes == ("<script>", "\\udcff", "caf\u00e9", "\U0001f600")
    rows = "".join(f"{number}.png,c{number:05d}\n" for number in range(10_000))
    many = make(tmp_path / "many", *(f"{number}.png" for number in range(10_000)))
    (many / "labels.csv").write_text("path,label\n" + rows)
    listing = listed(many, "labels.csv")
    assert len(listing.classes) == 10_000 and by_name(listing)["77.png"] == ("train", "c00077")


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_a_table_gives_labels_and_splits(tmp_path, ending, bom):
    """With or without BOM and CRLF; quoted fields may hold anything; other columns and blank lines are passed over."""
    path = make(tmp_path, "1.png", "a,b.png", "3.png", "unnamed.png")
    rows = ["id,path,label,split", "1,1.png,a/b,train", '2,"a,b.png","x, y",val', "", "3,./3.png,a/b,test"]
    (path / "labels.csv").write_text(bom + ending.join(rows), encoding="utf-8", newline="")
    for labels in ("labels.csv", str(path / "labels.csv")):
        listing = listed(path, labels)
        assert listing.classes == ("a/b", "x, y")
        assert by_name(listing) == {
            "1.png": ("train", "a/b"),
            "a,b.png": ("validation", "x, y"),
            "3.png": ("test", "a/b"),
        }
        assert "1 images that the labels do not name are passed over." in listing.notes


@pytest.mark.parametrize(
    ("table", "line", "what"),
    [
        ("", 1, "columns are none"),
        ("file,label\n1.png,a", 1, "columns are file, label"),
        ("path,label\n1.png,a\n1.png,b", 3, "stands in line 2 already"),
        ("path,label\n1.png,a\n\nmissing.png,b", 4, "no file 'missing.png'"),
        ("path,label\n1.png", 2, "1 fields, not 2"),
        ("path,label\n1.png,", 2, "label is empty"),
        ("path,label,split\n1.png,a,tarin", 2, "split is 'tarin'"),
        ('path,label\n1.png,a\n2.png,"b', 3, "unexpected end of data"),
        ("path,label\n", 1, "no image follows"),
    ],
)
def test_a_wrong_table_is_refused_by_line(tmp_path, table, line, what):
    """The line number and what is wrong with it."""
    path = make(tmp_path, "1.png", "2.png")
    (path / "labels.csv").write_text(table)
    message = refusal(path, "labels.csv")
    assert f"Line {line} of the labels" in message and what in message


def test_a_table_outside_of_the_source_is_refused(tmp_path):
    """Its changes would not be seen, and the stage not be run again."""
    path = make(tmp_path / "images", "1.png")
    (tmp_path / "labels.csv").write_text("path,label\n1.png,a")
    for labels in ("labels.csv", "../labels.csv", str(tmp_path / "labels.csv"), "folder"):
        assert "into the source" in refusal(path, labels)
        with pytest.raises(UserError, match="inside the source"):
            check_source(path, labels)


def test_a_source_without_images_is_refused_at_once(tmp_path):
    """Missing, empty, full of other things: the path and the layout expected."""
    (tmp_path / "empty").mkdir()
    make(tmp_path / "texts", "a/1.txt", "b/Thumbs.db", "c/.hidden.png")
    for name in ("empty", "texts"):
        assert "no images" in refusal(tmp_path / name) and "cat/1.png" in refusal(tmp_path / name)
        with pytest.raises(UserError, match="no images"):
            check_source(tmp_path / name, "folders")
    with pytest.raises(UserError, match="does not exist"):
        check_source(tmp_path / "missing", "folders")
    assert "no training images" in refusal(make(tmp_path / "val", "val/1.png", "test/2.png"))
    check_source(make(tmp_path / "fine", "1.png"), "folders")


def test_checking_a_source_needs_no_heavy_library():
    """It runs before anything else does."""
    code = "import sys, stages.images.listing; print({'torch', 'ray', 'pyarrow', 'numpy', 'PIL'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_labels_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    """A table in an archive, or one that changes while it is read."""
    make(tmp_path, "a.png")
    (tmp_path / "labels.csv").write_text("path,label\na.png,cat\n")

    def stumbles(source, member):
        raise UnreadableFile("changed while the images were read")

    monkeypatch.setattr(FolderSource, "read", stumbles)
    said = refusal(tmp_path, "labels.csv")
    assert "The labels: changed while the images were read." in said and str(tmp_path / "labels.csv") in said
