"""Every choice in conf/ composes and is valid, and params.yaml is what conf/ says."""

import dataclasses
from pathlib import Path

import pytest

from pipeline import params
from pipeline.compose import compose_params, to_yaml
from stages.config import Params

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
# A choice that needs another beside it.
COMPANIONS = {
    "vqvae=three_level": ["+prior@priors.middle=pixelcnn"],
    "cluster=gpus64": ["experiment=imagenet256"],  # whose batches 64 workers can share
}


def choices() -> list[str]:
    """Write every choice of every group as an override."""
    found = []
    for path in sorted(CONF.glob("*/*.yaml")):
        group = path.parent.name
        at = {"train": "train@train_vqvae", "prior": "prior@priors.top"}.get(group, group)
        if path.stem != "ffhq1024" or group == "experiment":  # three levels of a size of their own
            found.append(f"{at}={path.stem}")
    return found


def composed(*overrides: str) -> Params:
    return params.check(compose_params(overrides, CONF))


@pytest.mark.parametrize("override", choices())
def test_every_choice_composes(override):
    """A choice, taken alone, gives valid settings."""
    size = [] if override.startswith(("experiment", "dataset")) else ["dataset.image_size=64"]
    composed(override, *COMPANIONS.get(override, ()), *size)


def test_params_yaml_is_current():
    """params.yaml holds what conf/ composes: `vqvae2 config --write` would change nothing."""
    assert params.read(ROOT / "params.yaml") == compose_params((), CONF)


def test_what_is_written_reads_back_the_same(tmp_path: Path):
    """Composed settings survive the way through YAML."""
    data = compose_params(["experiment=ffhq1024"], CONF)
    (tmp_path / "params.yaml").write_text(to_yaml(data), encoding="utf-8")
    assert params.read(tmp_path / "params.yaml") == data


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_setting_is_spelled_out(experiment):
    """No setting is left to a default in code, whose change DVC would not see."""
    data = compose_params([f"experiment={experiment}"], CONF)
    plain = dataclasses.asdict(params.check(data))
    assert set(params.flat(data)) == set(params.flat(plain))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_says_how_to_run_it(experiment):
    """Each experiment opens with its command and its hardware."""
    head = (CONF / "experiment" / f"{experiment}.yaml").read_text(encoding="utf-8").split("\n\n")[0]
    assert "# command   vqvae2 run" in head and "# hardware  " in head


def test_imagenet_has_the_papers_numbers():
    """The appendix's table for 256 x 256."""
    settings = composed("experiment=imagenet256")
    assert settings.vqvae.grids(settings.dataset.image_size) == {"top": 32, "bottom": 64}
    assert (settings.train_vqvae.steps, settings.train_vqvae.batch_size) == (2_207_444, 128)
    top, bottom = settings.priors["top"].network, settings.priors["bottom"].network
    assert (top.channels, top.residual_channels, top.layers, top.attention_layers, top.heads) == (512, 2048, 20, 4, 8)
    assert (top.output_layers, top.kernel, top.dropout) == (20, 5, 0.1)
    assert (bottom.channels, bottom.residual_channels, bottom.layers, bottom.attention_layers) == (512, 1024, 20, 0)
    assert (bottom.output_layers, bottom.condition_layers, bottom.kernel, bottom.dropout) == (0, 20, 5, 0.1)
    assert top.condition_layers == 0
    trains = [settings.priors[level].train for level in ("top", "bottom")]
    assert [(train.batch_size, train.steps) for train in trains] == [(1024, 1_600_000), (512, 754_000)]
    _has_what_both_papers_runs_share(settings)


def test_ffhq_has_the_papers_numbers():
    """The appendix's table for 1024 x 1024."""
    settings = composed("experiment=ffhq1024")
    assert settings.vqvae.grids(settings.dataset.image_size) == {"top": 32, "middle": 64, "bottom": 128}
    assert (settings.train_vqvae.steps, settings.train_vqvae.batch_size) == (304_741, 128)
    assert list(settings.priors) == ["top", "middle", "bottom"]
    rows = {
        level: (
            prior.train.batch_size, prior.network.channels, prior.network.residual_channels, prior.network.layers,
            prior.network.attention_layers, prior.network.kernel, prior.network.dropout, prior.network.output_layers,
            prior.train.steps,
        )
        for level, prior in settings.priors.items()
    }  # fmt: skip
    assert rows == {
        "top": (1024, 512, 2048, 20, 4, 5, 0.5, 0, 237_000),
        "middle": (512, 512, 1024, 20, 1, 5, 0.3, 0, 57_400),
        "bottom": (256, 512, 1024, 10, 0, 5, 0.25, 0, 270_000),
    }
    assert [prior.network.condition_layers for prior in settings.priors.values()] == [0, 8, 8]
    assert settings.priors["top"].network.heads == 8
    _has_what_both_papers_runs_share(settings)


def _has_what_both_papers_runs_share(settings: Params) -> None:
    for level in settings.vqvae.levels.values():
        assert (level.channels, level.residual_channels, level.residual_blocks) == (128, 64, 2)
        assert (level.entries, level.dim) == (512, 64)
    quantizer = settings.vqvae.quantizer
    assert (quantizer.mode, quantizer.beta, quantizer.decay, quantizer.revive_every) == ("ema", 0.25, 0.99, 0)
    assert settings.vqvae.level_dropout == 0
    assert (settings.sample.temperature, settings.sample.top_k, settings.sample.top_p) == (1, 0, 1)
    assert (settings.augment.flip, settings.augment.shift, settings.codes.copies) == (False, 0, 1)


def test_a_cluster_changes_nothing_else():
    """Choosing another cluster changes that section alone."""
    here, there = compose_params((), CONF), compose_params(["cluster=gpus8"], CONF)
    assert {key for key in here if here[key] != there[key]} == {"cluster"}
