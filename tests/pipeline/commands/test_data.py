"""Tests of `vqvae2 data`."""

import json
import re
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import pytest
from PIL import Image

from pipeline.commands import data
from stages.errors import UserError

ROOT = Path(__file__).parents[3]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder of images with a doubtful class, as the current folder with the settings of params.yaml."""
    for number, name in enumerate(("cat", "cat", "<b>dog</b>".replace("/", "\u2215"), "test")):
        path = tmp_path / "photos" / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (number, 0, 0)).save(path)
    (tmp_path / "photos" / "notes.txt").touch()
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    for key, value in {"source": "photos", "labels": "folders", "validation_fraction": "0.0"}.items():
        text = re.sub(f"\\b{key}: .*", f"{key}: {value}", text)
    (tmp_path / "params.yaml").write_text(text, encoding="utf-8")
    with chdir(tmp_path):
        yield tmp_path


def show(capsys: pytest.CaptureFixture[str], *, sample: int = 0, as_json: bool = False) -> str:
    assert data.show((), out=None, sample=sample, as_json=as_json) == 0
    return capsys.readouterr().out


def test_text_has_splits_classes_sizes_and_doubts(folder, capsys):
    """The text states which files are left out, and the doubts."""
    text = show(capsys)
    assert text.startswith("dataset     emoji: photos, classes from folders\n")
    assert re.search(r"^cat +2$", text, re.MULTILINE) and re.search(r"^all images +4$", text, re.MULTILINE)
    assert "width 40 / 40 / 40, height 30 / 30 / 30 pixels (smallest / median / largest)\n" in text
    assert "4 are not square and are cropped; 4 are smaller and are enlarged" in text
    assert "note        1 file that is not an image is ignored: .txt 1.\n" in text
    assert "DOUBT       The folder test is used as a class" in text


def test_json_has_the_same_facts(folder, capsys):
    """--json is for programs; names are complete."""
    result = json.loads(show(capsys, as_json=True))
    assert result["splits"] == {"train": 4, "validation": 0, "test": 0}
    assert result["classes"]["cat"] == {"train": 2, "validation": 0, "test": 0} and len(result["classes"]) == 3
    assert result["sizes"]["width"] == {"min": 40, "median": 40, "max": 40}
    assert (result["formats"], result["copies"], len(result["doubts"])) == ({"PNG": 4}, 0, 1)


def test_a_sample_of_headers_is_stated(folder, capsys):
    """Copies cannot be counted in it."""
    text = show(capsys, sample=2)
    assert "in 2 of 4 images" in text and "copies      not checked" in text


def test_page_shows_images_of_each_class_offline(folder, capsys):
    """The page requests nothing, and names are escaped."""
    assert data.show((), out=Path("overview"), sample=0, as_json=False) == 0
    assert capsys.readouterr().out.endswith("page        overview/data.html\n")
    page = Path("overview/data.html").read_text(encoding="utf-8")
    assert page.count("<figure>") == 3 == page.count("data:image/png;base64,")
    assert "&lt;b&gt;dog" in page and "<b>dog" not in page
    assert "The folder test is used as a class" in page
    assert not re.search(r"(src|href)=\"(?!data:)|https?://|<script", page)


def test_images_without_classes_have_a_page(folder, capsys):
    """All images are in one sheet."""
    text = Path("params.yaml").read_text(encoding="utf-8")
    Path("params.yaml").write_text(text.replace("labels: folders", "labels: none"), encoding="utf-8")
    data.show((), out=Path("overview"), sample=0, as_json=False)
    assert "no classes" in capsys.readouterr().out
    assert Path("overview/data.html").read_text(encoding="utf-8").count("<figure>") == 1


@pytest.mark.parametrize("out", ["photos", "photos/cat/overview", "overview/../photos"])
def test_page_is_not_written_among_the_images(folder: Path, out: str):
    """It would change the data set, and with it the results."""
    with pytest.raises(UserError, match="outside of the source of images"):
        data.show((), out=Path(out), sample=0, as_json=False)
    assert not list(folder.rglob("data.html")) and not (folder / "photos/cat/overview").exists()
