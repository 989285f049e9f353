"""Tests of `vqvae2 sample`."""

from contextlib import chdir
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.commands import sample
from stages.config import LevelRule, SampleConfig
from stages.errors import UserError
from stages.formats.samples import open_samples
from stages.inference.folder import sampling_rule


def draw(out: Path, count: int = 5, *, seed: int = 0, top_k: int = 0, **options) -> None:
    """Draw with default settings; the contact sheet is written beside the folder."""
    config = SampleConfig(count=count, top_k=top_k)
    sample.draw(out, config, seed=seed, **{"sheet": sample.default_sheet(out), **options})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_drawn_images_equal_those_of_the_pipeline(artifacts, tmp_path: Path):
    """Image names have the number and the class, and the folder has no other images."""
    draw(tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.png"))
    drawn = np.stack([np.asarray(Image.open(path)) for path in files])
    assert (drawn == open_samples(artifacts.path("samples")).images(0, 5)).all()
    assert {path.stem[7:] for path in files} == {"dark", "light"}
    assert Image.open(tmp_path / "out.png").size > (100, 100)


def test_second_draw_replaces_the_first(artifacts, tmp_path: Path):
    """A folder holds images of one size and one draw, so that a metric over the folder means something."""
    draw(tmp_path / "out", 5)
    draw(tmp_path / "out", 2, seed=1)
    assert [name[:6] for name in names(tmp_path / "out")] == ["000000", "000001", "manife"]
    first = (tmp_path / "out.png").read_bytes()
    draw(tmp_path / "out", 2, seed=1)
    assert (tmp_path / "out.png").read_bytes() == first


@pytest.mark.parametrize("change", ["another file", "an edited image", "no manifest"])
def test_folder_with_other_files_is_refused(change, artifacts, tmp_path: Path):
    """Nothing is deleted that the command has not written."""
    out = tmp_path / "out"
    draw(out, 1)
    image = next(out.glob("*.png"))
    match change:
        case "another file":
            (out / "notes.txt").write_text("mine")
        case "an edited image":
            image.write_bytes(image.read_bytes()[:-1] + b"!")
        case "no manifest":
            (out / "manifest.json").unlink()
    before = names(out)
    with pytest.raises(UserError, match=r"new or empty folder, or hold only earlier drawn samples"):
        draw(out, 2)
    assert names(out) == before


def test_contact_sheet_replaces_no_other_file(artifacts, tmp_path: Path):
    """The contact sheet is neither among the images nor in the place of another picture."""
    (tmp_path / "out.png").write_bytes(b"a picture")
    with pytest.raises(UserError, match="exists and is not the contact sheet"):
        draw(tmp_path / "out")
    for sheet in (tmp_path / "out" / "sheet.png", tmp_path / "sheet.jpg", tmp_path / "absent" / "sheet.png"):
        with pytest.raises(UserError, match="The contact sheet must be"):
            draw(tmp_path / "out", sheet=sheet)
    assert not (tmp_path / "out").exists()
    draw(tmp_path / "out", sheet=tmp_path / "sheet.png")
    assert names(tmp_path) == ["out", "out.png", "sheet.png"]


def test_sheet_of_the_current_folder_lies_beside_it(tmp_path: Path):
    """`.` and `..` have no name of their own."""
    with chdir(tmp_path):
        assert sample.default_sheet(Path()) == tmp_path.with_name(f"{tmp_path.name}.png")
    assert sample.default_sheet(Path("a/b.c/")) == Path("a/b.c.png")


def test_samples_of_another_model_folder(artifacts, tmp_path: Path):
    """--model works outside of a project, with the sampling rule of that folder's samples."""
    model = artifacts.path("vqvae").parent
    with chdir(tmp_path):
        draw(Path("out"), 3, model=model)
        assert (np.asarray(Image.open(min(Path("out").glob("*.png")))) == _pipeline_image(artifacts)).all()
        with pytest.raises(UserError, match=r"must hold vqvae/ and priors/[\s\S]*PROJECT/artifacts"):
            draw(Path("other"), model=tmp_path)
    meta = open_samples(artifacts.path("samples")).artifact.meta
    assert sampling_rule(model).temperature == meta["temperature"]
    assert sampling_rule(tmp_path) == SampleConfig()


def _pipeline_image(artifacts) -> np.ndarray:
    return open_samples(artifacts.path("samples")).images(0, 1)[0]


def test_top_k_above_the_codebook_size_is_refused(artifacts, tmp_path: Path):
    """The error has the number of entries, and nothing is written."""
    entries = max(level.entries for level in artifacts.network.levels.values())
    draw(tmp_path / "out", 1, top_k=entries)
    with pytest.raises(UserError, match=rf"at most {entries}, .* got {entries + 1}\.[\s\S]*to 1 to {entries}, or to 0"):
        draw(tmp_path / "other", 1, top_k=entries + 1)
    config = SampleConfig(count=1, level_rules={"bottom": LevelRule(top_k=entries + 1)})
    with pytest.raises(UserError, match=r"bottom\.top_k must be at most .* the codebook of bottom"):
        sample.draw(tmp_path / "other", config, seed=0, sheet=tmp_path / "other.png")
    assert not (tmp_path / "other").exists()


def test_options_not_given_default_to_params_yaml():
    """Temperature, top-k and top-p default to the settings; count and classes do not."""
    settings = SampleConfig(count=256, classes=("flags",), temperature=0.7, top_k=5)
    assert sample.choose_config(settings, 16, ()) == replace(settings, count=16, classes=())
    config = sample.choose_config(settings, 16, ["food"], top_k=0, top_p=0.5)
    assert config == replace(settings, count=16, classes=("food",), top_k=0, top_p=0.5)


def test_option_out_of_range_is_refused():
    """The error names the option."""
    with pytest.raises(UserError) as caught:
        sample.choose_config(SampleConfig(), 1, (), top_k=-1)
    assert caught.value.where == "--top-k" and caught.value.code == 2


def test_options_of_one_level_change_only_its_rule():
    """They override options of all levels, which override the settings of single levels."""
    settings = SampleConfig(temperature=0.5, level_rules={"bottom": LevelRule(temperature=0.6, top_k=3)})
    config = sample.choose_config(settings, 4, (), ["top.guidance=2", "bottom.top_k=5"], temperature=0.9)
    assert config.rule("top") == {"temperature": 0.9, "top_k": 0, "top_p": 1.0, "guidance": 2.0}
    assert config.rule("bottom") == {"temperature": 0.9, "top_k": 5, "top_p": 1.0, "guidance": 1.0}
    assert SampleConfig.of_rule(config.describe_rule()).level_rules == config.level_rules


@pytest.mark.parametrize("text", ["bottom", "bottom.temperature", "bottom.heat=1", "bottom.top_k=1.5", "temperature=1"])
def test_option_of_one_level_in_another_form_is_refused(text: str):
    """The error has the option and an example."""
    with pytest.raises(UserError, match=r"is not an option of one level[\s\S]*bottom\.temperature=0\.8"):
        sample.choose_config(SampleConfig(), 4, (), [text])


@pytest.mark.parametrize("text", ["bottom.temperature=0", "bottom.top_p=2", "bottom.guidance=-1"])
def test_option_of_one_level_out_of_range_is_refused(text: str):
    """The error has the rule."""
    with pytest.raises(UserError, match="must be"):
        sample.choose_config(SampleConfig(), 4, (), [text])


def test_rule_of_an_unknown_level_is_refused(artifacts, tmp_path: Path):
    """Nothing is written."""
    config = SampleConfig(count=1, level_rules={"middle": LevelRule(top_k=1)})
    with pytest.raises(UserError, match=r"'middle' is not a level[\s\S]*top, bottom"):
        sample.draw(tmp_path / "out", config, seed=0, sheet=tmp_path / "sheet.png")
    assert not (tmp_path / "out").exists()
