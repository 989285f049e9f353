"""Table of labels: a CSV inside the source with a row per image, in the dialects that spreadsheets and libraries write.

path,label,split              1.png,cat,train       relative to the source
file_name,label               1.png,cat             metadata.csv of Hugging Face, relative to its folder
Filename;Class                cat\\1.png;cat         from spreadsheets: semicolons or tabs, UTF-16 or Windows-1252
"""

import codecs
import csv
import io
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from stages.errors import UserError
from stages.images.layout import Candidate, class_name, split_folders, split_of
from stages.images.sources import Member, printable

# Names of columns in any case, in order of preference.
PATH_COLUMNS = (
    "path", "file_name", "filename", "file", "image", "image_path", "img_path", "file_path", "filepath", "img",
    "image_name", "image_id", "id",
)  # fmt: skip
LABEL_COLUMNS = ("label", "class", "category", "target", "class_name", "label_name", "labels")
SPLIT_COLUMNS = ("split", "subset", "partition")
EXPECTED_COLUMNS = (
    "Use a header with a column of image paths (path, file_name, filename, file or image), one of classes (label, "
    "class, category or target) and optionally one of splits (split), such as: path,label"
)
FALLBACK_ENCODING = "cp1252"  # of a table that is not UTF-8: Latin-1 with the characters that Windows adds
_DELIMITERS = ",;\t|"
_UNICODE_MARKS = (  # first bytes -> encoding; UTF-32 first, because its mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SHOWN_COLUMNS = 8  # in a message


class Row(NamedTuple):
    """One row of a table: the class of one image."""

    line: int
    name: str  # of the image, as in the table
    label: str
    split: str  # "": the table has no column of splits


class Table(NamedTuple):
    """Rows, encoding, and messages about assumptions."""

    rows: Sequence[Row]
    encoding: str
    messages: Sequence[str]


def read_table(data: bytes, where: Path) -> Table:
    """Read the rows of a table. Raises UserError if its columns or one of its rows are invalid."""
    text, encoding, messages = _decode(data)
    if text[:4].lower() == "sep=":  # written by Excel
        text = "\n" + text.partition("\n")[2]
    try:
        header, delimiter = _header(text)
    except csv.Error as error:
        raise invalid_row(where, 1, str(error)) from None
    columns = [_find_column(header, names) for names in (PATH_COLUMNS, LABEL_COLUMNS, SPLIT_COLUMNS)]
    path_index, label_index, split_index = columns
    if path_index is None or label_index is None:
        raise _invalid_header(header, where)
    for column in (column for column in columns if column is not None):
        _check_unique(header, column, where)
    names = [printable(header[column].strip()) for column in columns if column is not None]
    if names != ["path", "label", "split"][: len(names)] or delimiter != ",":
        separator = {"\t": "tabs", ";": "semicolons", "|": "bars", ",": "commas"}[delimiter]
        messages.append(f"{where.name} is read with the columns {', '.join(names)}, separated by {separator}.")
    rows = list(_rows(text, delimiter, header, (path_index, label_index, split_index), where))
    if not rows:
        raise UserError(
            "The labels list no images: there is no row below the header.",
            where=where,
            fix="Add a row for each image.",
            code=4,
        )
    return Table(rows, encoding, messages)


def invalid_row(where: Path, line: int, problem: str) -> UserError:
    """Create the UserError for an invalid line of a table."""
    return UserError(f"Line {line} of the labels is invalid: {problem}.", where=where, fix="Fix this line.", code=4)


def has_columns(data: bytes) -> bool:
    """Return whether data begins with a header that names paths and classes."""
    try:
        header, _ = _header(_decode(data)[0])
    except csv.Error:
        return False
    return None not in (_find_column(header, PATH_COLUMNS), _find_column(header, LABEL_COLUMNS))


def match_rows(table: Table, index: "ImageIndex", folder: str, where: Path) -> dict[Member, Row]:
    """Find the image of each row. `folder` is the table's folder, relative to the source.

    Raises UserError if a row names no image, several images, or the image of an earlier row.
    """
    matched: dict[Member, Row] = {}
    for row in table.rows:
        members = index.find(row.name, folder, table.encoding) or index.find(row.name.strip(), folder, table.encoding)
        if not members:
            raise invalid_row(where, row.line, f"the source has no file {printable(row.name)!r}")
        if len(members) > 1:
            names = " and ".join(printable(member.name) for member in members[:2])
            raise invalid_row(where, row.line, f"{printable(row.name)!r} matches {names}; write the full path")
        if members[0] in matched:
            line = matched[members[0]].line
            raise invalid_row(where, row.line, f"{printable(row.name)} is already listed in line {line}")
        matched[members[0]] = row
    return matched


def to_candidates(matched: dict[Member, Row], messages: list[str]) -> list[Candidate]:
    """Return the listed images with their classes. Without a column of splits, splits come from folder names."""
    splits: dict[str, str] = {}
    if not any(row.split for row in matched.values()):
        splits = split_folders(member.name for member in matched)
        if splits:
            messages.append("The table has no column of splits: splits come from folder names.")
    return [
        Candidate(member, row.split or splits.get(member.name, ""), class_name(row.label))
        for member, row in matched.items()
    ]


class ImageIndex:
    """Index of a source's images by the names a table may use."""

    def __init__(self, members: Iterable[Member], source: Path):
        self.by_name: dict[str, Member] = {}
        self.by_short_name: dict[str, list[Member]] = defaultdict(list)  # file name with and without suffix
        for member in members:
            path = PurePosixPath(member.name)
            self.by_name.setdefault(member.name, member)
            self.by_name.setdefault(_nfc(member.name), member)
            for short_name in {_nfc(path.name), _nfc(path.stem)}:
                self.by_short_name[short_name].append(member)
        self.prefixes = tuple(f"{path.as_posix()}/" for path in (source, source.absolute(), source.resolve()))
        self.short_names_used = 0  # rows whose image was identified by its file name alone

    def find(self, name: str, folder: str, encoding: str) -> Sequence[Member]:
        """Return the image of a name in a table, or all candidates.

        Names are relative to the folder of the table, to the source or to the current folder. They may have
        backslashes, another Unicode form, bytes that are not UTF-8, or no folder or suffix.
        """
        for candidate in self._candidates(name, folder, encoding):
            if member := self.by_name.get(candidate):
                return [member]
        if "/" in name or "\\" in name:
            return []
        members = self.by_short_name.get(_nfc(name), [])
        self.short_names_used += len(members) == 1
        return members

    def _candidates(self, name: str, folder: str, encoding: str) -> Iterator[str]:
        forms = [name, name.replace("\\", "/")]
        forms += [form.removeprefix(prefix) for form in forms for prefix in self.prefixes if form.startswith(prefix)]
        for form in dict.fromkeys(form.removeprefix("./") for form in forms):
            for path in (f"{folder}/{form}" if folder else form, form):
                yield path
                yield _nfc(path)
                if encoding == FALLBACK_ENCODING:  # file names may use this encoding too
                    yield path.encode(encoding, "replace").decode("utf-8", "surrogateescape")


def _decode(data: bytes) -> tuple[str, str, list[str]]:
    """Decode a table; also return the encoding, and a message if it was assumed."""
    encoding = next((encoding for mark, encoding in _UNICODE_MARKS if data.startswith(mark)), "")
    if not encoding and b"\0" in data[:200]:  # ASCII as UTF-16 has a zero in every second byte
        encoding = "utf-16-le" if data[1:2] == b"\0" else "utf-16-be"
    try:
        return data.decode(encoding or "utf-8"), encoding or "utf-8", []
    except UnicodeDecodeError:
        text = data.decode(FALLBACK_ENCODING, "replace")
        return text, FALLBACK_ENCODING, ["The table of labels is not UTF-8 and is read as Windows-1252 (Latin-1)."]


def _header(text: str) -> tuple[list[str], str]:
    """Return the columns of a table and its delimiter: the first that splits the header into path and label columns."""
    line = next((line for line in text.splitlines() if line.strip()), "")
    headers = {delimiter: next(csv.reader([line], delimiter=delimiter), []) for delimiter in _DELIMITERS}
    for delimiter, header in headers.items():
        if _find_column(header, PATH_COLUMNS) is not None and _find_column(header, LABEL_COLUMNS) is not None:
            return header, delimiter
    delimiter = max(headers, key=lambda delimiter: len(headers[delimiter]))
    return headers[delimiter], delimiter


def _find_column(header: Sequence[str], names: Sequence[str]) -> int | None:
    columns = _column_names(header)
    return next((columns.index(name) for name in names if name in columns), None)


def _column_names(header: Sequence[str]) -> list[str]:
    return [column.strip().lower().replace(" ", "_").replace("-", "_") for column in header]


def _check_unique(header: Sequence[str], column: int, where: Path) -> None:
    """Raise UserError if other columns have the name of this one."""
    names = _column_names(header)
    if names.count(names[column]) > 1:
        raise UserError(
            f"The labels have {names.count(names[column])} columns named {printable(header[column].strip())}.",
            where=where,
            fix="Remove or rename all but one of them.",
            code=4,
        )


def _invalid_header(header: Sequence[str], where: Path) -> UserError:
    columns = ", ".join(printable(column) for column in header[:_SHOWN_COLUMNS]) or "none"
    more = f" and {len(header) - _SHOWN_COLUMNS} more" if len(header) > _SHOWN_COLUMNS else ""
    return UserError(
        f"The labels need a column of image paths and one of classes, got the columns {columns}{more}.",
        where=where,
        fix=f"{EXPECTED_COLUMNS}.",
        code=4,
    )


def _rows(
    text: str, delimiter: str, header: Sequence[str], columns: tuple[int, int, int | None], where: Path
) -> Iterator[Row]:
    path_index, label_index, split_index = columns
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for number, fields in enumerate(row for row in reader if any(row)):
            line = reader.line_num
            if number == 0:
                continue
            if len(fields) != len(header):
                raise invalid_row(where, line, f"it must have {len(header)} fields, got {len(fields)}")
            if not fields[path_index].strip():
                raise invalid_row(where, line, "the path is empty")
            if not fields[label_index].strip():
                raise invalid_row(where, line, "the label is empty")
            value = fields[split_index] if split_index is not None else ""
            if split_index is not None and not split_of(value):
                raise invalid_row(where, line, f"the split must be train, validation or test, got {printable(value)!r}")
            yield Row(line, fields[path_index], fields[label_index].strip(), split_of(value))
    except csv.Error as error:
        raise invalid_row(where, reader.line_num, str(error)) from None


def _nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)
