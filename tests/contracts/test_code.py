"""Imports point one way, each library has its place, and dvc.yaml watches the code that decides results."""

import ast
import importlib.metadata
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline import dvc_yaml, params

ROOT = Path(__file__).parents[2]
PACKAGES = ("pipeline", "stages", "models")

BELOW = {"pipeline": {"pipeline", "stages", "models"}, "stages": {"stages", "models"}, "models": {"models"}}
PLACES = {
    "ray": ("stages/",),
    "torch.distributed": ("stages/training/",),
    "mlflow": ("stages/tracking/mlflow_sync.py",),
    "hydra": ("pipeline/compose.py",),
    "omegaconf": ("pipeline/compose.py",),
    "typer": ("pipeline/cli.py",),
    "pickle": (),
    "torchvision": (),
    "dvc": (),  # a program here, not a library
}


STAGES = dvc_yaml.stages(params.read(ROOT / "params.yaml"), ROOT / "dvc.yaml")
# Imported by stages, and yet no reason to run them again.
NO_REASON = {
    "models/config.py": "settings, all of which params.yaml spells out",
    "stages/config.py": "the same",
    "stages/errors.py": "words",
    "stages/images/contact_sheet.py": "how sheets are laid out for people",
    "stages/formats/artifact.py": "how folders are committed, not what is in them",
    "stages/formats/model_file.py": "the same, for weights",
    "stages/formats/curves.py": "the same, for curves",
    "stages/training/checkpoint.py": "resuming ends in the same bytes",
    "stages/runtime/cluster.py": "where, not what",
    "stages/runtime/control.py": "who hears of it, not what it is",
    "stages/mapping/remote_parts.py": "where, not what",
    "stages/runtime/fault_injection.py": "what breaks a run, not what it makes",
    "stages/training/ray_train.py": "where, not what",
    "stages/mapping/parts.py": "where, not what",
    "stages/mapping/heartbeat.py": "where, not what",
    "stages/runtime/context.py": "an interface",
    "stages/runtime/storage.py": "where, not what",
    "models/priors/__init__.py": "a table; the network it names is watched",
}
# Who reads an artifact depends on its bytes. Who writes it depends on this code.
FORMATS = {
    "stages/images/sources.py": "shard",
    "stages/images/listing.py": "shard",
    "stages/images/decode.py": "shard",
    "stages/formats/shards.py": "shard",
    "stages/formats/codes.py": "codes",
    "stages/formats/samples.py": "sample",
}


def files(*packages: str) -> Iterator[Path]:
    """List the Python files of some packages, or of all three, relative to the root."""
    for package in packages or PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path.relative_to(ROOT)


def imports(path: Path) -> set[str]:
    """Name the modules a file imports anywhere in it; `from a import b` counts as a and as a.b."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports name their package in full"
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def reached(path: Path, stage: str, found: set[str]) -> set[str]:
    """Name the files whose code decides a stage's results, following imports from one of them."""
    name = path.as_posix()
    if name in found or name in NO_REASON or FORMATS.get(name, stage) != stage:
        return found
    found.add(name)
    for module in imports(path):
        for file in (Path(*module.split(".")).with_suffix(".py"), Path(*module.split("."), "__init__.py")):
            if file.parts[0] in ("stages", "models") and (ROOT / file).is_file() and (ROOT / file).stat().st_size:
                reached(file, stage, found)
    return found


@pytest.mark.parametrize("path", files(), ids=str)
def test_imports_point_one_way(path):
    """pipeline -> stages -> models: nothing imports what stands above it."""
    ours = {name.split(".")[0] for name in imports(path)} & BELOW.keys()
    assert ours <= BELOW[path.parts[0]]


@pytest.mark.parametrize("path", files("stages"), ids=str)
def test_what_stages_share_knows_no_stage(path):
    """stages/formats, metrics and runtime import no stage."""
    if len(path.parts) == 2:
        pytest.skip("stands beside the stages")
    assert not imports(path) & {f"stages.{stage.module}" for stage in STAGES.values()}


@pytest.mark.parametrize("library", PLACES)
def test_each_library_has_its_place(library):
    """A library that is to be replaceable is imported where the house says, and nowhere else."""
    for path in files():
        if any(name == library or name.startswith(f"{library}.") for name in imports(path)):
            assert path.as_posix().startswith(PLACES[library]), f"{path} imports {library}"


def test_nothing_reads_a_pickle():
    """No file is loaded in a way that can run code, but the installed feature network's, as weights only."""
    for path in files():
        text = (ROOT / path).read_text(encoding="utf-8")
        assert not re.search(r"weights_only=False|allow_pickle=True|hydra.*instantiate|\.extract(all)?\(", text), path
        for line in re.findall(r".*torch\.load\(.*", text):
            assert path.as_posix() == "stages/metrics/features.py" and "weights_only=True" in line, f"{path}: {line}"


def test_one_torch_is_required_and_nothing_that_brings_another():
    """constraints.txt names torch once, none of its companions, which are built for one release each, and no CUDA."""
    names = [re.split(r"[^\w-]", line)[0] for line in (ROOT / "constraints.txt").read_text().splitlines()]
    assert names.count("torch") == 1
    assert not {"torchvision", "torchaudio"} & set(names) and not [name for name in names if name.startswith("nvidia-")]


def test_one_torch_is_installed_and_it_is_the_tested_one():
    """There is no second copy and no torchvision; a torch for CPUs has brought no CUDA along."""
    pinned = re.search(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    found = [((each.metadata["Name"] or "").lower(), each.version) for each in importlib.metadata.distributions()]
    (version,) = [version for name, version in found if name == "torch"]
    assert pinned and version.partition("+")[0] == pinned[1]
    names = {name for name, _ in found}
    assert not {"torchvision", "torchaudio"} & names
    if not torch.backends.cuda.is_built():
        assert not [name for name in names if name.startswith("nvidia-")]


@pytest.mark.parametrize("name", STAGES)
def test_the_code_that_decides_results_is_watched(name):
    """Each file a stage imports is a dependency in dvc.yaml, or stands above with the reason why not."""
    stage = STAGES[name]
    needed = reached(Path("stages", f"{stage.module}.py"), stage.module, set())
    if stage.module == "prior":
        network = params.load(ROOT / "params.yaml").priors[stage.level].network.name
        needed |= reached(Path("models", "priors", f"{network}.py"), stage.module, set())
    if stage.module not in ("vqvae", "prior"):  # what networks compute is watched where they learn
        needed -= {path for other in STAGES.values() if other.module in ("vqvae", "prior") for path in other.code}
    assert {path for path in needed if not path.startswith(stage.code)} == set()


def test_stages_meet_on_disk():
    """No stage imports another."""
    names = {f"stages.{stage.module}" for stage in STAGES.values()}
    for stage in STAGES.values():
        path = Path("stages", f"{stage.module}.py")
        assert not imports(path) & (names - {f"stages.{stage.module}"}), path
