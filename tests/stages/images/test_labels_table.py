"""Tests of tables of labels: the dialects, headers and paths that CSV files have as people have them."""

from pathlib import Path

import pytest

from stages.errors import UserError
from stages.images.listing import Listing, check_source, list_images, unused_tables
from stages.images.sources import FolderSource, Member, UnreadableFile


def make(path: Path, *names: str) -> Path:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"image")
    return path


def listed(path: Path, labels: str = "labels.csv") -> Listing:
    return list_images(path, labels, validation_fraction=0.0)


def by_name(listing: Listing) -> dict[str, tuple[str, str]]:
    """Return split and class by name."""
    return {image.member.name: (image.split, listing.classes[image.label]) for image in listing.images}


def refusal(path: Path, labels: str = "labels.csv") -> UserError:
    with pytest.raises(UserError) as caught:
        listed(path, labels)
    return caught.value


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_a_csv_defines_labels_and_splits(tmp_path, ending, bom):
    """With or without BOM and CRLF; other columns and blank lines are ignored."""
    path = make(tmp_path, "1.png", "a,b.png", "3.png", "unnamed.png")
    rows = ["nr,path,label,split", "1,1.png,a/b,train", '2,"a,b.png","x, y",val', "", "3,./3.png,a/b,test"]
    (path / "labels.csv").write_text(bom + ending.join(rows), encoding="utf-8", newline="")
    for labels in ("labels.csv", str(path / "labels.csv")):
        listing = listed(path, labels)
        assert listing.classes == ("a/b", "x, y")
        assert by_name(listing) == {
            "1.png": ("train", "a/b"),
            "a,b.png": ("validation", "x, y"),
            "3.png": ("test", "a/b"),
        }
        assert "1 image that the labels do not list is ignored." in listing.messages
        assert not any("files that are not images" in message for message in listing.messages)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_a_csv_of_any_dialect_is_read(tmp_path, encoding, delimiter):
    """Windows-1252, which is no UTF-8, is converted with a message."""
    path = make(tmp_path, "1.png", "2.png")
    rows = (("File Name", "Class"), ("1.png", "Müller"), ("2.png", "Österreich"))
    (path / "labels.csv").write_bytes("\r\n".join(delimiter.join(row) for row in rows).encode(encoding))
    listing = listed(path)
    assert by_name(listing) == {"1.png": ("train", "Müller"), "2.png": ("train", "Österreich")}
    assumed = "The table of labels is not UTF-8 and is read as Windows-1252 (Latin-1)."
    assert (assumed in listing.messages) == (encoding == "cp1252")
    assert any(
        message.startswith("labels.csv is read with the columns File Name, Class") for message in listing.messages
    )


@pytest.mark.parametrize("path_column", ["path", "file_name", "filename", "image", "file", "Image Path", "FILE"])
@pytest.mark.parametrize("label_column", ["label", "class", "category", "target", "Class Name"])
def test_the_usual_headers_are_known(tmp_path, path_column, label_column):
    """In any case, with spaces or underscores."""
    (make(tmp_path, "1.png") / "labels.csv").write_text(f"{path_column},{label_column}\n1.png,cat\n")
    assert by_name(listed(tmp_path)) == {"1.png": ("train", "cat")}


def test_metadata_of_hugging_face_in_each_split_folder_is_read(tmp_path):
    """File names are relative to the folder of the table, and the folders name the splits."""
    path = make(tmp_path, "train/1.png", "train/2.png", "test/1.png")
    (path / "train/metadata.csv").write_text("file_name,label\n1.png,cat\n2.png,dog\n")
    (path / "test/metadata.csv").write_text("file_name,label\n1.png,dog\n")
    listing = listed(path, "metadata.csv")
    assert by_name(listing) == {
        "train/1.png": ("train", "cat"),
        "train/2.png": ("train", "dog"),
        "test/1.png": ("test", "dog"),
    }
    assert "The table has no column of splits: splits come from folder names." in listing.messages


def test_paths_may_be_written_in_other_ways(tmp_path):
    """Backslashes, absolute paths inside the source, paths from the current folder, and another Unicode form."""
    names = ["cat/1.png", "cat/2.png", "cat/3.png", "cat/e\u0301.png", "cat/\udcfc.png"]
    path = make(tmp_path / "images", *names)
    rows = [r"cat\1.png", str(path / "cat/2.png"), r".\cat\3.png", "cat/\u00e9.png", "cat/ü.png"]
    (path / "labels.csv").write_bytes(b"path,label\n" + "".join(f"{row},x\n" for row in rows).encode("cp1252"))
    assert set(by_name(listed(path))) == set(names)


def test_spaces_around_paths_are_ignored(tmp_path):
    """As around labels, unless the file has them."""
    path = make(tmp_path, "1.png", " 2.png", "2.png", "cat/3.png")
    (path / "labels.csv").write_text("path , label\n1.png , cat\n 2.png,dog\n 3 , dog\n")
    assert by_name(listed(path)) == {
        name: ("train", label) for name, label in (("1.png", "cat"), (" 2.png", "dog"), ("cat/3.png", "dog"))
    }


def test_names_without_folder_or_suffix_identify_an_image(tmp_path):
    """Several images of that name are refused."""
    path = make(tmp_path, "images/1.png", "images/2.jpg", "other/2.jpg")
    (path / "labels.csv").write_text("id,target\n1,cat\n")
    listing = listed(path)
    assert by_name(listing) == {"images/1.png": ("train", "cat")}
    assert "1 row of the labels names its image without its folder or suffix." in listing.messages
    (path / "labels.csv").write_text("id,target\n2,cat\n")
    assert "'2' matches images/2.jpg and other/2.jpg; write the full path" in refusal(path).what


def test_a_table_that_is_not_used_is_mentioned(tmp_path):
    """Classes come from folders by default."""
    path = make(tmp_path, "1.png", "2.png")
    (path / "metadata.csv").write_text("file_name,label\n1.png,cat\n")
    (path / "sizes.csv").write_text("file_name,width\n1.png,30\n")
    assert listed(path, "folders").doubts == (
        "metadata.csv lists classes and is not used. To use it: -S dataset.labels=metadata.csv",
    )


def test_an_unused_table_that_cannot_be_read_is_ignored(tmp_path):
    """A line longer than the csv module allows, NUL bytes, nothing at all, or a file without permission."""
    path = make(tmp_path, "1.png", "2.png")
    for number, data in enumerate([b"x" * 200_000, b"path,label\0", b"", b"\0", b"\xff\xfe\0"]):
        (path / f"{number}.csv").write_bytes(data)
    (path / "gone.tsv").symlink_to("nowhere.tsv")
    assert len(listed(path, "folders").images) == 2
    check_source(path, "folders")

    class Unreadable(FolderSource):
        def read(self, member):
            raise UnreadableFile("the file changed after it was listed")

    assert unused_tables(Unreadable(path), [Member("metadata.csv", 0, 10)]) == []


def test_a_table_with_an_overlong_line_is_rejected(tmp_path):
    """In the header and in a row."""
    path = make(tmp_path, "1.png")
    for text, line in (("x" * 200_000, 1), (f"path,label\n1.png,{'x' * 200_000}\n", 2)):
        (path / "labels.csv").write_text(text)
        assert refusal(path).what == f"Line {line} of the labels is invalid: field larger than field limit (131072)."


@pytest.mark.parametrize(
    ("table", "columns"),
    [("", "none"), ("1.png,cat\n2.png,dog\n", "1.png, cat"), ("file_name,text\n1.png,a cat", "file_name, text")],
)
def test_a_table_without_the_columns_is_rejected(tmp_path, table, columns):
    """The error names the columns of the table and the expected ones."""
    (make(tmp_path, "1.png", "2.png") / "labels.csv").write_text(table)
    error = refusal(tmp_path)
    assert error.what == f"The labels need a column of image paths and one of classes, got the columns {columns}."
    assert "path, file_name" in error.fix and error.fix.endswith("such as: path,label.")


@pytest.mark.parametrize(
    ("table", "line", "problem"),
    [
        ("path,label\n1.png,a\n1.png,b", 3, "already listed in line 2"),
        ("path,label\n1.png,a\n\nmissing.png,b", 4, "no file 'missing.png'"),
        ("path,label\n/elsewhere/1.png,b", 2, "no file '/elsewhere/1.png'"),
        ("path,label\n1.png", 2, "2 fields, got 1"),
        ("path,label\n1.png,", 2, "label is empty"),
        ("path,label\n ,cat", 2, "path is empty"),
        ("path,label,split\n1.png,a,tarin", 2, "got 'tarin'"),
        ('path,label\n1.png,a\n2.png,"b', 3, "unexpected end of data"),
        ("sep=;\npath;label\n1.png;a\n3.png;a", 4, "no file '3.png'"),
    ],
)
def test_an_invalid_row_is_rejected_with_its_line_number(tmp_path, table, line, problem):
    """The error names the line and the violation."""
    (make(tmp_path, "1.png", "2.png") / "labels.csv").write_text(table)
    assert (
        refusal(tmp_path).what.startswith(f"Line {line} of the labels is invalid") and problem in refusal(tmp_path).what
    )


@pytest.mark.parametrize(
    ("table", "what", "fix"),
    [
        ("path,label\n", "The labels list no images: there is no row below the header.", "Add a row for each image."),
        ("path,Label,label\n1.png,a,b\n", "The labels have 2 columns named Label.", "all but one"),
        ("file-name,File Name,label\n1.png,1.png,b\n", "The labels have 2 columns named file-name.", "all but one"),
        (
            f"path,label\n1.png,{'word ' * 60}\n",
            "A class name must have at most 255 characters, got 299: word word word word word word word word ...",
            "short names",
        ),
    ],
)
def test_an_ambiguous_or_useless_table_is_rejected(tmp_path, table, what, fix):
    """No rows, two columns of one name, and captions as classes. Unused columns may have any names."""
    (make(tmp_path, "1.png", "2.png") / "labels.csv").write_text(table)
    assert refusal(tmp_path).what == what and fix in refusal(tmp_path).fix
    (tmp_path / "labels.csv").write_text("path,label,x,x,,\n1.png,cat,1,2,,\n")
    assert by_name(listed(tmp_path)) == {"1.png": ("train", "cat")}


def test_a_missing_table_is_rejected_with_those_of_the_source(tmp_path):
    """The names of the source's tables are suggested."""
    (make(tmp_path, "1.png") / "metadata.csv").write_text("file_name,label\n1.png,cat\n")
    assert refusal(tmp_path).fix == "Set dataset.labels to a CSV of the source: metadata.csv"
