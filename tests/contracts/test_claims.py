"""docs/claims.md and docs/deviations.md name commands, functions, settings, files and numbers that exist."""

import importlib
import re
import shlex
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import pytest
import typer

from pipeline import ablations, dvc_yaml, params
from pipeline.cli import app
from pipeline.composed_from import CONF
from stages.formats.flatten import flatten

ROOT = Path(__file__).parents[2]
CLAIMS, DEVIATIONS = (ROOT / "docs" / name for name in ("claims.md", "deviations.md"))
PATH = re.compile(r"(?:benchmarks|conf|metrics|models|tests)/[\w./]+\.\w+")
ARTIFACT_OF_A_RUN = "artifacts/"
GROUP = typer.main.get_command(app)
COLUMNS = ("lines", "claim", "command", "measured here", "paper", "a run of the paper's size needs")


def rows(page: Path, header: str) -> Iterator[list[str]]:
    """Yield the cells of each row of the tables whose header begins with a column."""
    in_table = False
    for line in page.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line[1:-1].split("|")] if line.startswith("|") else []
        if not cells:
            in_table = False
        elif cells[0].strip() == header:
            in_table = True
        elif in_table and not line.startswith("|---"):
            yield [*cells, *[""] * (len(COLUMNS) - len(cells))]


CLAIM_ROWS = list(rows(CLAIMS, "lines"))
COMMANDS = sorted({cells[2].strip("`") for cells in CLAIM_ROWS if cells[2]})


def test_every_line_of_the_response_has_a_row():
    """Lines 9 to 58 of the author response make claims; the page covers all of them."""
    covered = set()
    for cells in CLAIM_ROWS:
        first, _, last = cells[0].removeprefix("R ").partition("-")
        covered |= set(range(int(first), int(last or first) + 1))
    assert covered == set(range(9, 59))
    assert all(cells[2] or "not offered" in cells[3] for cells in CLAIM_ROWS)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_parses(command: str):
    """The program accepts the command with these options, settings, stages and ablations."""
    program, *arguments = shlex.split(command)
    if program == "python":
        assert (ROOT / arguments[0]).is_file()
        return
    assert program == "vqvae2"
    name, *options = arguments
    parser = GROUP if name == "run" else GROUP.commands[name]
    parser.make_context(name, list(options))
    values = params.read(ROOT / "params.yaml")
    for option in options:
        key, sign, value = option.removeprefix("+").partition("=")
        if sign:
            is_choice = (ROOT / CONF / key / f"{value}.yaml").is_file()
            assert is_choice or params.look_up(values, key) is not None, option
    if "--stage" in options:
        stages = dvc_yaml.stages(values, ROOT / dvc_yaml.FILE)
        dvc_yaml.find(options[options.index("--stage") + 1], stages)
    if name == "ablate":
        with chdir(ROOT):
            ablations.select(options, ablations.read())


def test_functions_exist():
    """Each function and class of the second table is in its module."""
    for cells in rows(CLAIMS, "part"):
        for name in re.findall(r"`((?:models|stages|pipeline)\.[\w.]+)`", cells[2]):
            module_name, names = _split(name)
            value: object = importlib.import_module(module_name)
            for attribute in names:
                value = getattr(value, attribute)


@pytest.mark.parametrize("page", [CLAIMS, DEVIATIONS], ids=lambda page: page.name)
def test_settings_exist(page: Path):
    """Each setting is one of params.yaml, or a mapping there, such as sample.level_rules."""
    settings = set(flatten(params.read(ROOT / "params.yaml")))
    sections = {key.partition(".")[0] for key in settings}
    named = set(re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)`", page.read_text(encoding="utf-8")))
    unknown = {name for name in named if name.partition(".")[0] in sections} - settings
    assert not {name for name in unknown if not any(key.startswith(f"{name}.") for key in settings)}


def test_numbers_stand_in_their_files():
    """A measured number with decimals is in the file that its row names; the other files exist as well."""
    for cells in CLAIM_ROWS:
        paths = [ROOT / name for name in PATH.findall(cells[3]) if not name.startswith(ARTIFACT_OF_A_RUN)]
        paths += [CLAIMS.parent / link for link in re.findall(r"\]\(([^)#]+)", cells[3])]
        assert all(path.is_file() for path in paths), cells[3]
        numbers = re.findall(r"\d+\.\d+", re.sub(r"\([^)]*\)|`[^`]*`", "", cells[3]))
        texts = [path.read_text(encoding="utf-8") for path in paths]
        missing = [number for number in numbers if not any(number in text for text in texts)]
        assert not missing or "manifest" in cells[3], f"{missing} of: {cells[3]}"


def _split(name: str) -> tuple[str, list[str]]:
    """Split a dotted name into its module and the names inside of it."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        if (ROOT / Path(*parts[:length])).with_suffix(".py").is_file():
            return ".".join(parts[:length]), parts[length:]
    raise AssertionError(f"{name} is in no module")
