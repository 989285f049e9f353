"""What `vqvae2 plan` counts, and what it says of labels."""

import json
from pathlib import Path

import pytest

from pipeline import params
from pipeline.commands import plan
from stages.config import Params

ROOT = Path(__file__).parents[2]


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    """The settings of params.yaml, in a folder that holds them and no images."""
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    monkeypatch.chdir(tmp_path)
    return params.load()


def images(settings: Params, *classes: str) -> None:
    """Lay empty images of some classes where the settings look for them: names are all that is read."""
    for name in classes:
        folder = Path(settings.dataset.source).with_suffix("") / name
        folder.mkdir(parents=True)
        (folder / "image.png").touch()
    text = Path("params.yaml").read_text(encoding="utf-8")
    source = settings.dataset.source
    Path("params.yaml").write_text(text.replace(source, source.removesuffix(".zip")), encoding="utf-8")


def printed(capsys: pytest.CaptureFixture[str]) -> dict:
    assert plan.show((), as_json=True) == 0
    return json.loads(capsys.readouterr().out)


def test_priors_are_counted_with_the_classes_of_the_images(settings, capsys):
    """By the names in the source; each class has its row in every block's table of labels."""
    images(settings, "cats", "dogs", "owls")
    plain = {each.stage: each for each in plan.count(settings, 0)}
    found = printed(capsys)
    assert found["classes"] == 3
    for each in found["trainings"][1:]:
        assert each["parameters"] == plain[each["stage"]].parameters + 3 * each["parameters_per_class"]
        assert each["parameters_per_class"] > 0
        assert each["forward_flops"] == plain[each["stage"]].forward_flops  # a label is looked up
    assert found["trainings"][0]["parameters_per_class"] == 0


def test_where_the_images_are_not_here_the_plan_says_what_a_class_would_add(settings, capsys):
    """It counts none, and hides it not."""
    assert printed(capsys)["classes"] is None
    each = list(plan.count(settings, 0))
    plan.show((), as_json=False)
    last = capsys.readouterr().out.splitlines()[-2]
    assert last == (
        "classes: not known before the images are here, so none are counted; each would add "
        f"{each[1].parameters_per_class:,} to prior_top, {each[2].parameters_per_class:,} to prior_bottom"
    )


def test_images_without_labels_have_no_classes(settings, capsys):
    """Whether they are here or not."""
    text = Path("params.yaml").read_text(encoding="utf-8")
    Path("params.yaml").write_text(text.replace("labels: folders", "labels: none"), encoding="utf-8")
    assert printed(capsys)["classes"] == 0
    plan.show((), as_json=False)
    assert capsys.readouterr().out.splitlines()[-2] == "classes: none, as the images have no labels"
