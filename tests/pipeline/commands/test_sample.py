"""Tests of `vqvae2 sample`."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.commands import sample
from stages.config import SampleConfig
from stages.errors import UserError
from stages.formats.samples import open_samples


def test_drawn_images_equal_those_of_the_pipeline(artifacts, tmp_path: Path):
    """Image names have the number and the class."""
    sample.draw(tmp_path / "out", SampleConfig(count=5), seed=0)
    files = sorted((tmp_path / "out").glob("0*.png"))
    drawn = np.stack([np.asarray(Image.open(path)) for path in files])
    assert (drawn == open_samples(artifacts.path("samples")).images(0, 5)).all()
    assert {path.stem[7:] for path in files} == {"dark", "light"} and (tmp_path / "out" / "sheet.png").exists()


def test_top_k_above_the_codebook_size_is_refused(artifacts, tmp_path: Path):
    """The error has the number of entries, and nothing is written."""
    entries = max(level.entries for level in artifacts.network.levels.values())
    sample.draw(tmp_path / "out", SampleConfig(count=1, top_k=entries), seed=0)
    with pytest.raises(UserError, match=rf"at most {entries}, .* got {entries + 1}\.[\s\S]*to 1 to {entries}, or to 0"):
        sample.draw(tmp_path / "other", SampleConfig(count=1, top_k=entries + 1), seed=0)
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
