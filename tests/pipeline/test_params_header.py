"""Tests of the header of params.yaml."""

from pipeline import params, params_header
from pipeline.commands import config


def test_header_has_the_overrides_as_given(current_project):
    """Overrides with any signs and quotes are read back unchanged; without overrides the header has no such line."""
    overrides = ["vqvae=three_level", "+prior@priors.middle=pixelcnn", "dataset.source='photos (1) # 2'"]
    config.run(overrides, write=True)
    assert params_header.read_overrides() == overrides
    config.run([], write=True)
    assert params_header.read_overrides() == [] and params.FILE.read_text().splitlines()[1] == "seed: 0"
