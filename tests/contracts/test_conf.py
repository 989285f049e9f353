"""Every choice in conf/ composes to valid settings, and params.yaml is what conf/ composes to."""

import dataclasses
from pathlib import Path

import pytest

from models.config import PriorConfig
from pipeline import params
from pipeline.commands import plan
from pipeline.compose import compose_params, to_yaml
from stages.config import Params
from stages.formats.flatten import flatten

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
# Group -> the key of a choice in overrides, if it is another one.
KEYS = {
    "train": "train@train_vqvae",
    "prior": "prior@priors.top",
    "classifier": "+classifier@classifiers.shards",
    "rejection": "+rejection@rejections.samples",
    "critic": "+critic",
}
# Overrides that a choice requires.
COMPANIONS = {
    "+rejection@rejections.samples=half": ["+classifier@classifiers.shards=small"],
    "+rejection@rejections.samples=strict": ["+classifier@classifiers.shards=small"],
    "vqvae=three_level": ["+prior@priors.middle=pixelcnn"],
    "cluster=gpus64": ["experiment=imagenet256"],  # batches of 64 images or more
    **{  # the demo has fewer steps than their warm-up
        f"prior@priors.top={name}": ["priors.top.train.steps=100000"]
        for name in ("ffhq_bottom", "ffhq_middle", "ffhq_top", "imagenet_bottom", "imagenet_top")
    },
}


def choices() -> list[str]:
    """Return every choice of every group as an override."""
    overrides = []
    for path in sorted(CONF.glob("*/*.yaml")):
        group = path.parent.name
        key = KEYS.get(group, group)
        if path.stem != "ffhq1024" or group == "experiment":  # needs images of 1024 pixels
            overrides.append(f"{key}={path.stem}")
    return overrides


def composed(*overrides: str) -> Params:
    return params.check(compose_params(overrides, CONF))


@pytest.mark.parametrize("override", choices())
def test_every_choice_composes(override):
    """A single choice gives valid settings."""
    size = [] if override.startswith(("experiment", "dataset")) else ["dataset.image_size=64"]
    composed(override, *COMPANIONS.get(override, ()), *size)


def test_params_yaml_is_current():
    """params.yaml holds what conf/ composes: `vqvae2 config --write` would change nothing."""
    is_current = params.read(ROOT / "params.yaml") == compose_params((), CONF)
    assert is_current, "params.yaml is not what conf/ composes to. Run: vqvae2 config --write"


def test_composed_settings_survive_yaml(tmp_path: Path):
    """Settings that are written as YAML are read back unchanged."""
    data = compose_params(["experiment=ffhq1024"], CONF)
    (tmp_path / "params.yaml").write_text(to_yaml(data), encoding="utf-8")
    assert params.read(tmp_path / "params.yaml") == data


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_setting_is_explicit(experiment):
    """No setting is left to a default in code: DVC would not notice if that changed."""
    data = compose_params([f"experiment={experiment}"], CONF)
    checked = dataclasses.asdict(params.check(data))
    assert set(flatten(data)) == set(flatten(checked))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_file_states_command_and_hardware(experiment):
    """Each experiment file begins with its command and its hardware."""
    head = (CONF / "experiment" / f"{experiment}.yaml").read_text(encoding="utf-8").split("\n\n")[0]
    assert "# command   vqvae2 run" in head and "# hardware  " in head


def test_imagenet_matches_the_paper():
    """The ImageNet preset has the numbers of the paper's table for 256 x 256."""
    settings = composed("experiment=imagenet256")
    assert settings.vqvae.grids(settings.dataset.image_size) == {"top": 32, "bottom": 64}
    assert (settings.train_vqvae.steps, settings.train_vqvae.batch_size) == (2_207_444, 128)
    top, bottom = settings.priors["top"].network, settings.priors["bottom"].network
    assert (top.channels, top.residual_channels, top.layers, top.attention_layers, top.attention_heads) == (
        512,
        2048,
        20,
        4,
        8,
    )
    assert (top.output_layers, top.kernel_size, top.dropout) == (20, 5, 0.1)
    assert (bottom.channels, bottom.residual_channels, bottom.layers, bottom.attention_layers) == (512, 1024, 20, 0)
    assert (bottom.output_layers, bottom.condition_layers, bottom.kernel_size, bottom.dropout) == (0, 20, 5, 0.1)
    assert top.condition_layers == 0
    trains = [settings.priors[level].train for level in ("top", "bottom")]
    assert [(train.batch_size, train.steps) for train in trains] == [(1024, 1_600_000), (512, 754_000)]
    _assert_common_settings_of_the_paper(settings)


def test_ffhq_matches_the_paper():
    """The FFHQ preset has the numbers of the paper's table for 1024 x 1024."""
    settings = composed("experiment=ffhq1024")
    assert settings.vqvae.grids(settings.dataset.image_size) == {"top": 32, "middle": 64, "bottom": 128}
    assert (settings.train_vqvae.steps, settings.train_vqvae.batch_size) == (304_741, 128)
    assert list(settings.priors) == ["top", "middle", "bottom"]
    rows = {
        level: (
            prior.train.batch_size, prior.network.channels, prior.network.residual_channels, prior.network.layers,
            prior.network.attention_layers, prior.network.kernel_size, prior.network.dropout,
            prior.network.output_layers, prior.train.steps,
        )
        for level, prior in settings.priors.items()
    }  # fmt: skip
    assert rows == {
        "top": (1024, 512, 2048, 20, 4, 5, 0.5, 0, 237_000),
        "middle": (512, 512, 1024, 20, 1, 5, 0.3, 0, 57_400),
        "bottom": (256, 512, 1024, 10, 0, 5, 0.25, 0, 270_000),
    }
    assert [prior.network.condition_layers for prior in settings.priors.values()] == [0, 8, 8]
    assert settings.priors["top"].network.attention_heads == 8
    _assert_common_settings_of_the_paper(settings)


def _assert_common_settings_of_the_paper(settings: Params) -> None:
    for level in settings.vqvae.levels.values():
        assert (level.channels, level.residual_channels, level.residual_blocks) == (128, 64, 2)
        assert (level.entries, level.dim) == (512, 64)
    quantizer = settings.vqvae.quantizer
    assert (quantizer.mode, quantizer.beta, quantizer.decay, quantizer.revive_every) == ("ema", 0.25, 0.99, 0)
    assert settings.vqvae.level_dropout == 0
    assert (settings.sample.temperature, settings.sample.top_k, settings.sample.top_p) == (1, 0, 1)
    assert (settings.augment.flip, settings.augment.max_shift, settings.codes.copies) == (False, 0, 1)


# Number of classes; parameters and forward FLOPs of each network.
COSTS: dict[str, tuple[int, dict[str, tuple[int, int]]]] = {
    "imagenet256": (
        1000,
        {
            "vqvae": (1_782_339, 9_546_235_904),
            "prior_top": (416_468_992, 906_256_973_824),
            "prior_bottom": (418_563_584, 2_416_464_363_520),
        },
    ),
    "ffhq1024": (
        0,
        {
            "vqvae": (3_172_419, 75_984_011_264),
            "prior_top": (333_012_992, 777_407_954_944),
            "prior_middle": (318_347_264, 2_352_056_631_296),
            "prior_bottom": (186_179_072, 4_874_821_435_392),
        },
    ),
}


@pytest.mark.parametrize("experiment", COSTS)
def test_paper_networks_have_the_derived_cost(experiment):
    """Every prior has exactly the parameters of the paper's table and those of the pieces named below."""
    classes, costs = COSTS[experiment]
    settings = composed(f"experiment={experiment}")
    measured = {cost.stage: (cost.parameters, cost.forward_flops) for cost in plan.count(settings, classes)}
    for coarser, (level, prior) in enumerate(settings.priors.items()):
        table = table_parameters(prior.network, classes, coarser)
        pieces = extra_parameters(prior.network, classes, coarser)
        assert measured[f"prior_{level}"][0] == table + sum(pieces.values())
    assert measured == costs


def table_parameters(network: PriorConfig, classes: int, coarser: int) -> int:
    """Count the parameters of one stack whose blocks have 13 unmasked taps, then a 1x1 convolution."""
    c, r, k = network.channels, network.residual_channels, 512
    table = k * c + 13 * c * c + network.layers * (13 * c * r + 2 * r * c + classes * 2 * c) + c * k
    table += network.attention_layers * (4 * c * c + 9 * c * c) + network.output_layers * (c * r + 2 * r * c)
    if coarser:
        table += network.layers * 2 * c * c + 9 * c * c + network.condition_layers * (9 * c * r + r * c)
    return table


def extra_parameters(network: PriorConfig, classes: int, coarser: int) -> dict[str, int]:
    """Count the parameters of this implementation that `table_parameters` does not count, by piece."""
    c, r, k, n, attentions = network.channels, network.residual_channels, 512, network.layers, network.attention_layers
    pieces = {
        "the stem is strictly causal, one tap less": -c * c,
        "a separate layer maps the code embedding into the keys": attentions * c * c,
        "position channels, at the stem, the queries and the keys": 2 * c + attentions * 2 * 2 * c,
        "biases": c + n * (r + 2 * c) + attentions * 3 * 3 * c + network.output_layers * (r + 2 * c) + k,
    }
    if coarser:
        pieces |= {
            "the coarser codes have embeddings": coarser * k * c,
            "more coarser levels enter the first convolution": (coarser - 1) * 9 * c * c,
            "a transposed convolution upsamples the coarser map": 16 * c * c + c,
            "biases of the conditioning stack": c + network.condition_layers * (r + c),
        }
    if network.name == "pixelcnn":
        pieces |= {
            "stems of 10 + 2 taps for 12": c,
            "blocks of 15 + 3 taps for 13": n * 5 * c * r,
            "second layers of the vertical stack": n * (2 * r * c + r + 2 * c),
            "conditions and labels of the vertical stack": n * (2 * c * c * bool(coarser) + classes * 2 * c),
            "from the vertical to the horizontal stack": n * c * r,
        }
    return pieces


def test_cluster_choice_changes_one_section():
    """Choosing another cluster changes no other section."""
    default, gpus8 = compose_params((), CONF), compose_params(["cluster=gpus8"], CONF)
    assert {key for key in default if default[key] != gpus8[key]} == {"cluster", "composed_from"}
