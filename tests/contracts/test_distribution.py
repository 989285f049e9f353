"""Source distribution and wheel: the sources, and no file of a user's."""

import ast
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from pipeline import dvc_yaml, params, result_versions
from pipeline import wheel as wheel_module
from tests.command_line_project import CommandLineProject
from tests.installed import Installation

ROOT = Path(__file__).parents[2]
PLOTS, DEMO = ".dvc/plots/page.html", "data/fluent-emoji-64.zip"

# What a used checkout holds besides the sources.
PRIVATE = (
    ".dvc/cache/files/md5/00/11",
    ".dvc/config.local",
    ".env",
    "artifacts/samples/part-00000.parquet",
    "data/holiday/0.png",
    "data/holiday.zip",
    "drawn/00000.png",
    "dvc_plots/index.html",
    "mlflow.db",
    "mlruns/1/artifacts/samples.png",
    "notebook.ipynb",
    "runs/shard/0123/part",
)
SOURCES = ("pipeline", "stages", "models", "hydra_plugins", "conf", "tests", "benchmarks", "docs", "deploy")


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a source distribution and a wheel that are built in a used checkout."""
    folder = tmp_path_factory.mktemp("checkout")
    CommandLineProject.of_working_tree(folder)
    for name in PRIVATE:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("private")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-t", "wheel"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder / "dist"


@pytest.fixture(scope="module")
def names(distributions: Path) -> set[str]:
    """Names in the source distribution."""
    (archive,) = distributions.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        return {name.partition("/")[2] for name in tar.getnames()}


def test_no_private_file_is_distributed(names: set[str]):
    """Images in DVC's cache, results, databases, secrets and what else lies in the folder."""
    assert names.isdisjoint(PRIVATE)
    tops = {name.partition("/")[0] for name in names if "/" in name}
    assert tops == {*SOURCES, "data", ".dvc"}
    assert {name for name in names if name.startswith(".dvc/")} == {
        ".dvc/.gitignore",
        ".dvc/config",
        *(f".dvc/plots/{name}" for name in ("bars.json", "curves.json", "page.html")),
    }


def test_every_source_file_is_distributed(names: set[str]):
    """Code, settings, tests, documents, the demo's images and the files that commands read."""
    listing = subprocess.check_output(["git", "ls-files", *SOURCES, "data"], cwd=ROOT, text=True)
    assert set(listing.splitlines()) <= names
    assert {
        "vqvae2.py",
        ".dvcignore",
        ".gitignore",
        "dvc.yaml",
        "params.yaml",
        "constraints.txt",
        "Makefile",
        "README.md",
        "LICENSE",
        "PKG-INFO",
    } <= names


def test_wheel_is_one_package_and_a_plugin(distributions: Path):
    """No generic name such as `models` is installed. `hydra_plugins` is Hydra's namespace for everybody's plugins."""
    (archive,) = distributions.glob("*.whl")
    with zipfile.ZipFile(archive) as wheel:
        wheel_names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert {name.partition("/")[0] for name in wheel_names} == {"vqvae2", "hydra_plugins"}
    code = subprocess.check_output(["git", "ls-files", *wheel_module.PACKAGES], cwd=ROOT, text=True).splitlines()
    assert {f"vqvae2/{name}" for name in code} - wheel_names == {"vqvae2/pipeline/wheel.py"}
    files = ("conf/config.yaml", "dvc.yaml", ".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitignore", PLOTS, DEMO)
    assert {f"vqvae2/{name}" for name in files} <= wheel_names
    assert not {name for name in wheel_names if name.endswith(PRIVATE)}


def test_imports_in_the_wheel_name_its_package():
    """Every import of the three packages gets the prefix, and nothing else changes, not even a line number."""
    for path, name in wheel_module.wheel_files(ROOT):
        if path.suffix == ".py":
            text = path.read_text(encoding="utf-8")
            prefixed = wheel_module.add_prefix(text)
            imports = [node for node in ast.walk(ast.parse(prefixed)) if isinstance(node, ast.Import | ast.ImportFrom)]
            modules = [
                node.module or "" if isinstance(node, ast.ImportFrom) else alias.name
                for node in imports
                for alias in node.names
            ]
            assert not {module.partition(".")[0] for module in modules} & set(wheel_module.PACKAGES), name
            restored = re.sub(rf"from vqvae2 import ({'|'.join(wheel_module.PACKAGES)})\b", r"import \1", prefixed)
            assert restored.replace("from vqvae2.", "from ").replace("import vqvae2.", "import ") == text, name


def test_import_that_cannot_get_the_prefix_fails_the_build():
    """`import stages.codes` binds `stages`, which the wheel does not have."""
    with pytest.raises(ValueError, match=r"line 1: write `import stages\.codes as \.\.\.`"):
        wheel_module.add_prefix("import stages.codes\nstages.codes.run()\n")


@pytest.fixture(scope="module")
def installation(distributions: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """The installed wheel, with foreign packages `models`, `pipeline` and `stages` in the folder and on PYTHONPATH."""
    (wheel,) = distributions.glob("*.whl")
    return Installation.of_wheel(wheel, tmp_path_factory.mktemp("installed"))


def test_installed_program_runs_its_own_code_beside_foreign_packages(installation: Installation):
    """Twenty photographs become a project, whose next command is a run of all stages."""
    assert "Usage: vqvae2" in installation.call("vqvae2", "--help").output
    for number in range(20):
        path = installation.folder / "photos" / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (80, 60), (number, 0, 0)).save(path)
    output = installation.call("vqvae2", "init", "pets", "--data", "photos").output
    assert "Classes (2): cat 10, dog 10." in output and output.splitlines()[-1] == "next      cd pets && vqvae2 run"
    dry_run = installation.call("vqvae2", "run", "--dry-run", folder="pets").output
    assert dry_run.splitlines()[-1] == "Stages: 7 would run."
    versions = installation.call("vqvae2", "versions", folder="pets").output
    data = params.read(installation.folder / "pets" / "params.yaml")
    settings = params.check(data)
    stages = dvc_yaml.stages(data, ROOT / "dvc.yaml").values()
    assert [line.split()[:2] for line in versions.splitlines()] == [
        [stage.cli_name, result_versions.source_of(stage, settings).version] for stage in stages
    ]


def test_python_api_works_beside_foreign_packages(installation: Installation):
    """A notebook imports its own `models` before and after `import vqvae2`, which does not add that name."""
    code = (
        "import models, sys, vqvae2; from vqvae2 import CodeTable, UserError; import stages, pipeline\n"
        "print(models.COLOR, stages.COLOR, pipeline.COLOR, CodeTable.__module__, UserError.__module__)"
    )
    printed = installation.call("python", "-c", code).output
    assert printed == "green green green vqvae2.stages.formats.code_table vqvae2.stages.errors\n"


def test_installed_program_runs_the_code_of_a_checkout(installation: Installation, distributions: Path):
    """In a copy of the repository, the copy's code runs, as with an editable installation."""
    checkout = distributions.parent
    (checkout / "pipeline" / "cli.py").write_text("def main():\n    print('the code of the checkout')\n")
    done = Installation(installation.programs, checkout).call("vqvae2", "status", PYTHONPATH="")
    assert done.output == "the code of the checkout\n"
