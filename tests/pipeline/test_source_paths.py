"""Paths of images in settings: what DVC would read as something else is replaced or refused before it runs."""

from pathlib import Path

import pytest

from pipeline import params
from pipeline.compose import compose_params, expand_home
from stages.errors import UserError

ROOT = Path(__file__).parents[2]
HOME = str(Path.home())


@pytest.mark.parametrize(
    ("override", "expanded"),
    [
        ("dataset.source=~/photos", f"dataset.source={HOME}/photos"),
        ("dataset.source='~/my photos (1)'", f"dataset.source='{HOME}/my photos (1)'"),
        ('dataset.source="~/a"', f'dataset.source="{HOME}/a"'),
        ("dataset.source=~", f"dataset.source={HOME}"),
        ("~prior@priors.top", "~prior@priors.top"),  # removes a choice
        ("dataset.source=photos/~old", "dataset.source=photos/~old"),
        ("seed=1", "seed=1"),
    ],
)
def test_home_folder_is_expanded_in_overrides(override, expanded):
    """A shell expands ~ only at the start of a word."""
    assert expand_home(override) == expanded


def test_composed_settings_have_the_full_path():
    """DVC reads params.yaml and takes ~ for the name of a folder."""
    data = compose_params(["dataset.source=~/photos"], ROOT / "conf")
    assert data["dataset"]["source"] == f"{HOME}/photos"


@pytest.mark.parametrize(
    ("source", "fix"),
    [
        (
            "https://host/a/images.zip",
            "dvc import-url https://host/a/images.zip data/images.zip. Then set dataset.source",
        ),
        ("http:images", "dvc import-url http:images data/images"),  # DVC takes it for a URL
        ("S3://bucket/images/", "S3 needs: pip install -c constraints.txt -e '.[s3]'"),
        ("gs://bucket", "dvc import-url gs://bucket data/images"),
        ("~/photos", f"Set dataset.source to {HOME}/photos"),
        ("~vqvae2-nobody/photos", "./~vqvae2-nobody/photos"),
    ],
)
def test_paths_that_are_not_of_this_machine_are_refused(source, fix):
    """The fix is the command that downloads the images, or the path to write."""
    data = params.read(ROOT / "params.yaml")
    data["dataset"]["source"] = source
    with pytest.raises(UserError, match=r"dataset\.source must be a path ") as caught:
        params.check(data)
    assert fix in caught.value.fix and caught.value.code == 2


@pytest.mark.parametrize(
    "source", ["a%20b", "what?", "a#b", "a:b", "s3", "./~", "photos~", "-x", "{a}", "x" * 200, "ünï"]
)
def test_folders_of_any_other_name_are_accepted(source):
    """DVC reads each of them as a path."""
    data = params.read(ROOT / "params.yaml")
    data["dataset"]["source"] = source
    assert params.check(data).dataset.source == source
