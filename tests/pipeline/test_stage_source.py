"""Result versions: edits that compute the same keep the hash of the code, edits that do not change it."""

import ast
import shutil
from pathlib import Path

import pytest

from pipeline import stage_source
from pipeline.stage_source import source_of
from pipeline.syntax import serialize

ROOT = Path(__file__).parents[2]
SOURCE = '''"""A stage."""

from models.toy import Layer

SCALE: float = 2.0


def run(size: int, layer: "Layer", *, seed: int) -> float:
    """Scale a layer."""
    if size < 1:
        raise ValueError(f"size must be 1 or more, got {size}")
    return helper(layer) * SCALE  # twice


def helper(layer: Layer) -> float:
    return layer.width


def unused() -> int:
    return 1


class Unused:
    """Nothing but an annotation names it."""
'''
MODEL = '''"""A layer."""

class Layer:
    """A width."""

    width = 3.0
    rates: "Rates"

    def grow(self) -> None:
        self.width += 1


class Rates:
    """The class of a field."""

    first = 0.1
'''


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A folder with one stage and one model."""
    for name, text in (("stages/toy.py", SOURCE), ("models/toy.py", MODEL)):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).with_name("__init__.py").touch()
        (tmp_path / name).write_text(text)
    return tmp_path


def edit(root: Path, name: str, old: str, new: str) -> None:
    text = (root / name).read_text()
    assert old in text
    (root / name).write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# twice", "# two times"),
        ('"""Scale a layer."""', '"""Multiply the width of a layer by a constant."""'),
        ('    """Scale a layer."""\n', ""),
        ("size: int", "size: float"),
        ('layer: "Layer", *', "layer: Layer, *"),
        ("def helper(layer: Layer)", "def helper(layer: Unused)"),
        ("-> float:\n    return layer", ":\n    return layer"),
        ("SCALE: float = 2.0", "SCALE: int = 2.0"),
        ("helper(layer) * SCALE", "(helper(\n        layer\n    ) * SCALE)"),
        ("size must be 1 or more, got {size}", "{size} is not a valid size"),
        ("def unused() -> int:\n    return 1", "def unused() -> int:\n    return 2"),
    ],
)
def test_edit_that_computes_the_same_keeps_the_hash(toy: Path, old: str, new: str):
    """Comments, docstrings, annotations, formatting, texts of errors and unused code cannot change a result."""
    before = source_of("toy", root=toy).hash
    edit(toy, "stages/toy.py", old, new)
    assert source_of("toy", root=toy).hash == before


@pytest.mark.parametrize(
    ("name", "old", "new", "changed"),
    [
        ("stages/toy.py", "= 2.0", "= 2.5", "stages.toy.SCALE"),
        ("stages/toy.py", "return layer.width", "return layer.width + 0", "stages.toy.helper"),
        ("stages/toy.py", "size < 1", "size < 2", "stages.toy.run"),
        ("stages/toy.py", "ValueError(", "KeyError(", "stages.toy.run"),
        ("models/toy.py", "width = 3.0", "width = 4.0", "models.toy.Layer"),
        ("models/toy.py", "first = 0.1", "first = 0.2", "models.toy.Rates"),
        ("models/toy.py", "+= 1", "+= 2", "models.toy.Layer.grow"),
        ("models/toy.py", '"""A layer."""', "import torch\ntorch.set_default_dtype(torch.float64)", "models.toy"),
    ],
)
def test_edit_that_computes_something_else_is_named(toy: Path, name: str, old: str, new: str, changed: str):
    """The one definition whose hash changes is the one that was edited."""
    before = source_of("toy", root=toy)
    edit(toy, name, old, new)
    after = source_of("toy", root=toy)
    assert after.hash != before.hash
    assert {key for key, digest in after.definitions.items() if before.definitions.get(key) != digest} == {changed}


def test_unknown_hash_is_a_version_of_its_own(toy: Path):
    """Code that the table does not know never passes for a known version."""
    code = source_of("toy", root=toy)
    assert code.version == code.hash


def test_edit_of_one_network_concerns_the_priors_that_use_it(tmp_path: Path):
    """Another prior network, and stages that train none, keep their hashes."""
    for package in stage_source.PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package)
    keys = [("prior", "pixelsnail"), ("prior", "pixelcnn"), ("vqvae", ""), ("codes", ""), ("sample", "")]
    before = {key: source_of(*key, root=tmp_path).hash for key in keys}
    edit(tmp_path, "models/priors/pixelcnn.py", "two_stacks = True", "two_stacks = bool(1)")
    after = {key: source_of(*key, root=tmp_path).hash for key in keys}
    assert [key for key in keys if after[key] != before[key]] == [("prior", "pixelcnn"), ("sample", "")]


def test_template_of_the_report_decides_the_evaluation_alone(tmp_path: Path):
    """The page's template is no Python and counts all the same."""
    for package in stage_source.PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package)
    before = {module: source_of(module, root=tmp_path).hash for module in ("evaluate", "sample")}
    edit(tmp_path, "stages/evaluation/report.html.j2", "<html", "<html ")
    assert source_of("sample", root=tmp_path).hash == before["sample"]
    assert source_of("evaluate", root=tmp_path).hash != before["evaluate"]


def test_later_python_gives_the_same_hash():
    """Later versions add fields to syntax trees; upgrading Python must not make results out of date."""
    tree = ast.parse(SOURCE)
    before = serialize(tree)
    for node in ast.walk(tree):
        node._fields = (*node._fields, "added_list", "added_node")  # empty where the source does not use them
        node.added_list, node.added_node = [], None
    assert serialize(tree) == before
