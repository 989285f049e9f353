"""The how-tos that add a prior, a dataset and a preset, followed step by step in a copy of the project.

The how-to for a metric is followed in tests/stages/evaluation/test_report.py.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from pipeline import params

ROOT = Path(__file__).parents[2]
VQVAE2 = ("-c", "from pipeline.cli import main; main()")
PRIOR = '''"""A new prior."""

from models.priors.base import Prior
from models.priors.layers import causal


class Mine(Prior):
    """One stack of causal convolutions."""

    convolution = staticmethod(causal)
'''


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for name in ("conf", "data", "models", "pipeline", "stages", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", "params.yaml", "pyproject.toml", ".dvcignore"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    call(tmp_path, "-m", "dvc", "init", "--no-scm", "--quiet")
    return tmp_path


def call(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(folder), "NO_COLOR": "1"}
    result = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_new_prior_passes_the_tests_of_every_prior(copy: Path):
    """A new prior takes one file, two lines and its settings. It is chosen by name and tested like the others."""
    (copy / "models/priors/mine.py").write_text(PRIOR)
    replace(copy / "models/priors/__init__.py", '"pixelcnn": PixelCNN', '"pixelcnn": PixelCNN, "mine": Mine')
    replace(
        copy / "models/priors/__init__.py",
        "from models.priors.pixelcnn",
        "from models.priors.mine import Mine\nfrom models.priors.pixelcnn",
    )
    replace(copy / "models/config.py", 'Literal["pixelsnail", "pixelcnn"]', 'Literal["pixelsnail", "pixelcnn", "mine"]')
    shutil.copyfile(copy / "conf/prior/pixelsnail.yaml", copy / "conf/prior/mine.yaml")
    replace(copy / "conf/prior/mine.yaml", "name: pixelsnail", "name: mine")

    output = call(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "mine", "tests/models/test_priors.py")
    assert int(output.splitlines()[-1].split()[0]) >= 10, output
    call(copy, *VQVAE2, "config", "prior@priors.top=mine", "--write")
    assert re.search(r"^prior_top +\w{16} .*models\.priors\.mine\.Mine", call(copy, *VQVAE2, "versions"), re.MULTILINE)
    assert json.loads(call(copy, *VQVAE2, "plan", "--json"))["trainings"][1]["parameters"] > 0


def test_new_dataset_is_one_file(copy: Path):
    """A new file in conf/dataset names the folder of images, and the checks before a run read them."""
    shutil.copyfile(copy / "conf/dataset/clothing64.yaml", copy / "conf/dataset/pets.yaml")
    replace(copy / "conf/dataset/pets.yaml", "name: clothing64", "name: pets\nsource: pets")
    for number, name in enumerate(("cat", "dog")):
        (copy / "pets" / name).mkdir(parents=True)
        Image.new("RGB", (80, 80), (number, 0, 0)).save(copy / "pets" / name / "1.png")
    call(copy, *VQVAE2, "config", "dataset=pets", "--write")
    findings = {finding["name"]: finding for finding in json.loads(call(copy, *VQVAE2, "doctor", "--json"))}
    assert findings["images"]["state"] == "ok", findings


def test_preset_of_the_howto_composes(copy: Path):
    """The file is shown whole: it composes, and its settings and choices are in params.yaml."""
    text = (ROOT / "docs/howto.md").read_text(encoding="utf-8").partition("## Write a preset")[2]
    (copy / "conf/experiment/mine.yaml").write_text(text.partition("```yaml\n")[2].partition("```")[0])
    call(copy, *VQVAE2, "config", "experiment=mine", "--write")
    data = params.read(copy / "params.yaml")
    assert data["dataset"] == {**data["dataset"], "source": "data/plants", "labels": "folders", "image_size": 64}
    assert data["augment"] == {"flip": True, "max_shift": 0} and data["train_vqvae"]["steps"] == 5000
    assert data["composed_from"]["choices"] == {
        **data["composed_from"]["choices"], "experiment": "mine", "dataset": "folder"
    }  # fmt: skip


def replace(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1, f"{old!r} in {file}"
    file.write_text(text.replace(old, new))
