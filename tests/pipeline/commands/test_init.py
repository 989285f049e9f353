"""Tests of `vqvae2 init` and of the projects that it and `vqvae2 demo` write."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import pytest
from PIL import Image

from pipeline import completion, composed_from, dvc_experiment, new_project, params, presets
from pipeline.commands import demo, init
from pipeline.compose import compose_params
from pipeline.params_drift import drift
from stages.errors import UserError

ROOT = Path(__file__).parents[3]
DVC_COMPOSITION = """
import os, sys
from dvc.utils.hydra import compose_and_dump
compose_and_dump("composed.yaml", os.path.abspath("conf"), None, "project", os.getcwd(), sys.argv[1:])
"""


@pytest.fixture
def current_folder(tmp_path: Path) -> Iterator[Path]:
    """An empty folder, as the current one."""
    with chdir(tmp_path):
        yield tmp_path


def write_photos(folder: Path, *, count: int = 6, size: tuple[int, int] = (400, 300)) -> Path:
    for number in range(count):
        path = folder / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (number, 0, 0)).save(path)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("size", "gpus", "preset", "image_size"),
    [((400, 300), 1, "photos256", 256), ((500, 40), 0, "photos32", 32)],
)
def test_preset_fits_the_images_and_the_machine(current_folder, capsys, size, gpus, preset, image_size):
    """The shorter side decides, and a GPU. The project composes to the recommended settings."""
    init.run(Path("my pets"), data=write_photos(Path("photos"), size=size), preset="", gpus=gpus)
    assert f"Preset: {preset}.\n" in capsys.readouterr().out
    with chdir("my pets"):
        data, settings = params.read(), params.load()
        assert not composed_from.is_edited(data)
        assert (settings.dataset.name, settings.dataset.image_size) == ("my_pets", image_size)
        assert settings.dataset.source == str(current_folder / "photos")
        assert presets.fit_of(data, settings).fits


def test_own_files_hide_those_of_the_package(current_folder):
    """Other files stay visible, and every choice of a preset keeps the images of the project."""
    init.run(Path("pets"), data=write_photos(Path("pets/photos")), preset="smoke")
    with chdir("pets"):
        assert params.load().dataset.source == "photos"
        Path("conf/experiment/wide.yaml").write_text("# @package _global_\ndefaults:\n  - mine\n  - _self_\nseed: 3\n")
        Path("conf/sample").mkdir()
        text = (ROOT / "conf/sample/smoke.yaml").read_text()
        Path("conf/sample/smoke.yaml").write_text(text.replace("temperature: 1.0", "temperature: 0.5"))
        data = compose_params(["experiment=wide"])
        assert data["seed"] == 3 and data["sample"]["temperature"] == 0.5
        assert (data["dataset"]["source"], data["dataset"]["image_size"]) == ("photos", 16)
        completed = completion.complete("setting", "experiment=")
        assert {"experiment=wide", "experiment=mine", "experiment=photos64"} <= set(completed)
        difference, fix = drift()
        assert "temperature" in difference and fix.endswith("vqvae2 config --write")


def test_dvc_composes_the_same_settings(current_folder):
    """`dvc exp run -S` composes the files of the project over those of the package, and keeps images and preset."""
    init.run(Path("pets"), data=write_photos(Path("pets/photos")), preset="smoke")
    with chdir("pets"):
        assert "config_name = project\n" in Path(".dvc/config").read_text()
        before = params.read()
        subprocess.run([sys.executable, "-c", DVC_COMPOSITION, "experiment=photos64"], check=True)
        by_dvc = params.read(Path("composed.yaml"))
        assert by_dvc == compose_params(["experiment=photos64"]) and by_dvc["dataset"]["source"] == "photos"
        assert not dvc_experiment.unasked_changes(before, by_dvc)


def test_project_has_a_commit_in_a_repository_of_its_own(current_folder):
    """DVC's experiments need one. Images are not committed, and a repository above is used instead of a new one."""
    write_photos(Path("pets/photos"))
    init.run(Path("pets"), data=Path("pets/photos"), preset="smoke")
    committed = subprocess.check_output(["git", "ls-files"], cwd="pets", text=True).splitlines()
    assert {"dvc.yaml", "params.yaml", ".dvc/config", ".dvc/.gitignore", "README.md"} <= set(committed)
    assert not [name for name in committed if name.startswith("photos")]
    init.run(Path("pets/inner"), data=None, preset="")
    assert not Path("pets/inner/.git").exists()
    assert params.load(Path("pets/inner/params.yaml")).dataset.source == "data/images"


@pytest.mark.parametrize(
    ("config", "is_committed"),
    [
        ("[user]\n    email = a@b\n    useConfigOnly = true\n", True),
        ("[user]\n    name = a\n    useConfigOnly = true\n", True),
        ("[commit]\n    gpgSign = true\n[gpg]\n    program = false\n", False),
    ],
    ids=["no name", "no address", "no key to sign"],
)
def test_commit_that_fails_is_left_to_the_user(
    current_folder, monkeypatch: pytest.MonkeyPatch, config: str, is_committed: bool
):
    """An identity that Git lacks is given for the first commit; other failures are not taken for success."""
    Path("gitconfig").write_text(config)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(Path("gitconfig").absolute()))
    Path("pets").mkdir()
    Path("pets/README.md").write_text("Mine.")
    assert new_project.initialize_git(Path("pets"), ["README.md"]) == is_committed
    commits = subprocess.run(["git", "rev-parse", "HEAD"], cwd="pets", capture_output=True, check=False)
    assert (commits.returncode == 0) == is_committed


def test_no_file_is_replaced(current_folder):
    """A clash is refused before anything is written. Lists of ignored files are completed, and a README stays."""
    folder = Path("pets")
    folder.mkdir()
    Path("pets/README.md").write_text("Mine.")
    Path("pets/.gitignore").write_text("/secret")
    Path("pets/params.yaml").write_text("lr: 1\n")
    before = contents(folder)
    with pytest.raises(UserError, match=r"The folder has params\.yaml, which a new project would replace"):
        init.run(folder, data=None, preset="")
    assert contents(folder) == before
    Path("pets/params.yaml").unlink()
    init.run(folder, data=None, preset="")
    assert Path("pets/README.md").read_text() == "Mine."
    lines = Path("pets/.gitignore").read_text().splitlines()
    assert lines[0] == "/secret" and "/artifacts/" in lines
    before = contents(folder)
    with pytest.raises(UserError, match="already a project of vqvae2"):
        init.run(folder, data=None, preset="")
    assert contents(folder) == before


def test_dvc_repository_of_the_user_gets_the_missing_settings(current_folder):
    """Its remotes stay, and settings that contradict are refused."""
    config_file = Path("pets/.dvc/config")
    config_file.parent.mkdir(parents=True)
    config_file.write_text("[hydra]\n    enabled = False\n")
    with pytest.raises(UserError, match=r"The folder has hydra\.enabled in \.dvc/config"):
        init.run(Path("pets"), data=None, preset="")
    config_file.write_text("[core]\n    no_scm = true\n['remote \"store\"']\n    url = /store\n")
    init.run(Path("pets"), data=None, preset="")
    text = config_file.read_text()
    assert "url = /store" in text and "config_name = project" in text and "html_template" in text


@pytest.mark.parametrize(
    ("data", "preset", "message"),
    [
        ("phots", "", "The source of images does not exist"),
        ("s3://bucket/images", "", "must be a path on this machine"),
        ("photos", "huge", "huge is not a valid preset"),
        (".", "", "must be outside of its images"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(current_folder, data, preset, message):
    """In one sentence, with the fix."""
    write_photos(Path("photos"))
    with pytest.raises(UserError, match=message) as caught:
        init.run(Path("pets"), data=Path(data), preset=preset)
    assert caught.value.fix and not Path("pets").exists()


def test_demo_has_the_settings_of_the_repository(current_folder):
    """`vqvae2 demo` computes what `make demo` does, from the same images."""
    demo.create(Path("demo"))
    assert params.read(Path("demo/params.yaml")) == params.read(ROOT / "params.yaml")
    assert demo.is_demo(Path("demo")) and not demo.is_demo(Path("other"))
    for name in ("dvc.yaml", "data/fluent-emoji-64.zip"):
        assert Path("demo", name).read_bytes() == (ROOT / name).read_bytes()
