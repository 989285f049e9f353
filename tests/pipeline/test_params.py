"""Tests of params.yaml: an invalid setting is reported with its key, rule, value and fix."""

import copy
from pathlib import Path

import pytest

from pipeline import conflicts, params
from stages.config import RESERVED_LEVEL_NAMES
from stages.errors import UserError
from stages.formats.flatten import flatten

DATA = params.read(Path(__file__).parents[2] / "params.yaml")
REMOVED = object()


def error_for(key: str, value: object) -> str:
    """Set or remove a key and return the text of the resulting error."""
    data = copy.deepcopy(DATA)
    *steps, leaf = key.split(".")
    section = data
    for step in steps:
        section = section[step]
    if value is REMOVED:
        del section[leaf]
    else:
        section[leaf] = value
    with pytest.raises(UserError) as error:
        params.check(data)
    assert error.value.code == 2
    return str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("train_vqvae.learing_rate", 0.1, "fix: Did you mean train_vqvae.learning_rate?"),
        ("vqvae.bta", 0.1, "fix: Did you mean vqvae.quantizer.beta?"),
        ("priors.top.network.chanels", 8, "fix: Did you mean priors.top.network.channels?"),
        ("vqvae.levels.top.entrys", 8, "fix: Did you mean vqvae.levels.top.entries?"),
        ("sed", 1, "sed is not a valid setting.\n  in: params.yaml\n  fix: Did you mean seed?"),
        ("zzz", 1, "fix: Remove zzz."),
        (
            "train_vqvae.steps",
            "many",
            'steps must be a valid integer, got "many".\n  in: params.yaml\n  fix: Set train',
        ),
        ("train_vqvae.steps", "1500", 'train_vqvae.steps must be a valid integer, got "1500".'),
        ("train_vqvae.steps", 1.5, "fix: Set train_vqvae.steps to a valid integer."),
        ("train_vqvae.learning_rate", float("nan"), "fix: Set train_vqvae.learning_rate to a finite number."),
        ("train_vqvae.learning_rate", float("inf"), "fix: Set train_vqvae.learning_rate to a finite number."),
        ("train_vqvae.learning_rate", None, "train_vqvae.learning_rate must be a valid number, got null."),
        ("train_vqvae.learning_rate", [0.1], "train_vqvae.learning_rate must be a valid number, got [0.1]."),
        ("train_vqvae.lr_schedule", "cosin", "train_vqvae.lr_schedule must be 'constant' or 'cosine', got \"cosin\"."),
        ("dataset", 3, "dataset must be a mapping of settings, got 3."),
        ("vqvae.levels", 3, "fix: Set these instead: vqvae.levels.LEVEL.stride, "),
        (
            "dataset.source",
            REMOVED,
            "dataset.source is missing.\n  in: params.yaml\n  fix: Add what is missing. To see the values of ",
        ),
        ("seed", "x" * 100, f'seed must be a valid integer, got "{"x" * 56}....'),
    ],
)
def test_wrong_key_or_type_is_reported_with_a_fix(key, value, expected):
    """The error has the full key, the expected type, the value and a fix."""
    assert expected in error_for(key, value)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("seed", -1, "seed must be 0 or more"),
        (
            "train_vqvae.steps",
            0,
            "train_vqvae.steps must be 1 or more, got 0.\n  in: params.yaml\n  fix: Set train_vqvae",
        ),
        ("train_vqvae.learning_rate", -1.0, "train_vqvae.learning_rate must be "),
        ("train_vqvae.warmup_steps", 10**6, "train_vqvae.warmup_steps must be at most the number of steps, which is "),
        ("train_vqvae.ema_decay", 1.0, "train_vqvae.ema_decay must be "),
        ("vqvae.levels.top.stride", 6, "vqvae.levels.top.stride must be a power of two"),
        ("vqvae.levels.top.stride", 2, "coarse to fine"),
        ("vqvae.levels.top.entries", 1, "vqvae.levels.top.entries must be 2 "),
        ("vqvae.levels.top.entries", 65_537, "65536"),
        ("vqvae.levels", {}, "vqvae.levels must "),
        ("vqvae.quantizer.decay", 1.0, "vqvae.quantizer.decay must be "),
        ("vqvae.quantizer.revive_below", 1.0, "vqvae.quantizer.revive_below must be "),
        ("vqvae.level_dropout", 1.0, "vqvae.level_dropout must be "),
        ("dataset.source", " ", "dataset.source must "),
        ("dataset.validation_fraction", 1.5, "dataset.validation_fraction must be "),
        ("dataset.jpeg_quality", 101, "dataset.jpeg_quality must be "),
        ("dataset.image_size", 30, "dataset.image_size must be a multiple of "),
        ("sample.top_p", 1.1, "sample.top_p must be "),
        ("priors.top.network.attention_layers", 7, "priors.top.network.layers must be a multiple of "),
        ("priors.top.network.kernel_size", 4, "priors.top.network.kernel_size must be odd"),
        ("sample.top_k", 257, "fix: Set sample.top_k to 1 to 256, or to 0 to keep all entries."),
        ("sample.level_rules", {"bottom": {"top_k": 257}}, "sample.level_rules.bottom.top_k"),
        ("sample.level_rules", {"middle": {"top_k": 1}}, "must name levels of vqvae.levels (top, bottom), got middle."),
        ("sample.level_rules", {"bottom": {"heat": 1}}, "sample.level_rules.bottom.heat"),
        ("sample.guidance", 2.0, "priors.top.network.label_dropout must be above 0 for a guidance of 2, got 0."),
        ("priors.top", REMOVED, "priors must have the levels of vqvae.levels (top, bottom), got bottom."),
        ("priors.top", REMOVED, "-S '+prior@priors.top=pixelcnn'"),
        ("vqvae.levels.top", REMOVED, "-S '~prior@priors.top'"),
        ("cluster.workers", 40, "train_vqvae.batch_size must be at least cluster.workers, which is 40, got 32."),
        ("cluster.workers", 40, "fix: Set train_vqvae.batch_size to 40 or more, or lower cluster.workers."),
        (
            "cluster.stages",
            {"prior": {"workers": 40}},
            "priors.top.train.batch_size must be at least cluster.stages.prior.workers, which is 40, got 32.",
        ),
        ("cluster.workers", [2, 40], "train_vqvae.batch_size must be at least cluster.workers, which is up to 40, got"),
        ("cluster.workers", [4, 2], "workers must be a pair [min, max] with 1 <= min <= max, got [4, 2]."),
        ("cluster.workers", [0, 2], "fix: Set cluster.workers to a pair [min, max] with 1 <= min <= max."),
        ("cluster.workers", [2], "cluster.workers must be a valid integer or a pair [min, max], got [2]."),
        ("cluster.workers", [1, 2, 3], "cluster.workers must be a valid integer or a pair [min, max], got [1, 2, 3]."),
        (
            "cluster.workers",
            ["1", 2.5],
            'cluster.workers must be a valid integer or a pair [min, max], got ["1", 2.5].',
        ),
        ("cluster.workers", "many", "fix: Set cluster.workers to a valid integer or a pair [min, max]."),
        ("cluster.stages", {"prior": {"workers": [0, 1]}}, "cluster.stages.prior.workers must be a pair [min, max]"),
        ("cluster.stages", {"shard": {"workers": 0}}, "cluster.stages.shard.workers must be 1 or more, got 0."),
        ("cluster.stages", {"shard": {"cpus_per_worker": "1"}}, "cluster.stages.shard.cpus_per_worker must be a "),
        ("cluster.stages", {"shard": {"worker": 1}}, "fix: Did you mean cluster.stages.shard.workers?"),
        ("cluster.stages", {"shard": {"stages": {}}}, "cluster.stages.shard.stages is not a valid setting."),
        ("cluster.stages", {"shart": {}}, "cluster.stages must name stages (shard, vqvae, codes, prior, prior_top, "),
        ("cluster.stages", {"shart": {}}, "fix: Did you mean cluster.stages.shard?"),
        ("cluster.stages", {"prior_middle": {}}, "classifier_shards, "),
        ("cluster.stages", {"train": {}}, "fix: Remove cluster.stages.train, or use one of these names."),
        ("train_vqvae.microbatch", 0, "train_vqvae.microbatch must be 1 or more, got 0."),
        ("train_vqvae.microbatch", "many", "train_vqvae.microbatch must be "),
    ],
)
def test_value_out_of_range_is_reported_with_its_rule(key, value, expected):
    """The error has the full key and the violated rule."""
    text = error_for(key, value)
    assert expected in text and "\n  fix: " in text


@pytest.mark.parametrize("name", sorted(RESERVED_LEVEL_NAMES))
def test_reserved_level_name_is_refused(name):
    """Files of codes have columns of these names, or metrics have rows of these names."""
    error = error_for("vqvae.levels", {name: {"stride": 4}})
    assert f"vqvae.levels must be named other than copy, key, label, pixels, total, got '{name}'." in error


NUMBERS = [key for key, value in flatten(DATA).items() if type(value) in (int, float)]


@pytest.mark.parametrize("value", [-1, float("nan")], ids=str)
@pytest.mark.parametrize("key", NUMBERS)
def test_every_number_rejects_negative_and_nan(key, value):
    """The error has the full key, the rule, the value and a fix with the key."""
    text = error_for(key, value)
    headline, _, fix = text.replace("NaN", "nan").splitlines()
    assert headline.startswith(f"{key} must be ") and f", got {value}" in headline  # -1, or -1.0 of a float
    assert fix.startswith("  fix: ") and key.rpartition(".")[2] in fix


@pytest.mark.parametrize(
    ("message", "section", "problem"),
    [
        (
            "workers must be 1 or more, got 0",
            "cluster",
            ("cluster.workers", "cluster.workers must be 1 or more, got 0.", "Set cluster.workers to 1 or more."),
        ),
        (
            "source must be a path, got ''; set it to a folder, a zip or a tar",
            "dataset",
            ("dataset.source", "dataset.source must be a path, got ''.", "Set it to a folder, a zip or a tar."),
        ),
        ("seed must be 0 or more, got -1", "", ("seed", "seed must be 0 or more, got -1.", "Set seed to 0 or more.")),
        (
            "two settings contradict each other",
            "vqvae",
            ("vqvae", "Two settings contradict each other.", "Choose values that are valid together."),
        ),
    ],
)
def test_errors_of_settings_classes_get_the_section_and_a_fix(message, section, problem):
    """A ValueError without a fix gets one from its rule."""
    assert conflicts.explain(ValueError(message), section) == problem


def test_several_errors_come_together():
    """All unknown keys are reported at once, each with its fix."""
    data = {**copy.deepcopy(DATA), "sed": 1, "dateset": {}}
    with pytest.raises(UserError) as error:
        params.check(data)
    assert error.value.what == "sed is not a valid setting.\ndateset is not a valid setting."
    assert error.value.fix == "sed: did you mean seed?\n       dateset: did you mean dataset?"


def test_priors_are_ordered_coarse_to_fine():
    """The order of priors is that of vqvae.levels, whatever their order in the file."""
    data = {**copy.deepcopy(DATA), "priors": dict(reversed(DATA["priors"].items()))}
    assert list(params.check(data).priors) == ["top", "bottom"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"seed: 1\nseed: 2\n", "duplicate key"),
        (b"seed: 1\n\tx: 2\n", "line 2"),
        (b"<<<<<<< HEAD\nseed: 1\n=======\nseed: 2\n>>>>>>> other\n", "not valid YAML"),
        ("seed: 1".encode("utf-16"), "not UTF-8"),
        (b"", "must be a YAML mapping, got null"),
        (b"- 1\n", r"must be a YAML mapping, got \[1\]"),
        (b"x: " + b"y" * params.MAX_BYTES, "must be at most 1000000 bytes, got 1000003"),
        (b"a: &a [x, x]\nb: &b [*a, *a]\n", "aliases are not supported"),
        (b"a: &a [*a]\n", "aliases are not supported"),
        (b"a: " + b"{a: " * 2000, "not valid YAML"),
        (b"a: !!int x\n", "not valid YAML"),
        (b"a: 2026-13-01\n", "not valid YAML"),
        (b"a: !!python/object/apply:os.abort []\n", "could not determine a constructor"),
    ],
    ids=["duplicate", "tab", "merge", "utf16", "empty", "list", "huge", "bomb", "loop", "deep", "int", "date", "code"],
)
def test_file_that_is_not_a_mapping_of_settings_is_rejected(tmp_path, text, expected):
    """The error has the reason, and the line if there is one."""
    path = tmp_path / "params.yaml"
    path.write_bytes(text)
    with pytest.raises(UserError, match=expected) as error:
        params.read(path)
    assert error.value.code == 2 and str(path) in error.value.where


@pytest.mark.parametrize(
    "invalid", [{("a", "b"): 1}, {"seed": 10**5000}, {"seed": "\ud800"}], ids=["key", "digits", "surrogate"]
)
def test_settings_that_are_not_json_data_are_rejected(invalid):
    """YAML has keys, numbers and characters that JSON does not have."""
    with pytest.raises(UserError, match="must be valid JSON data") as error:
        params.check({**DATA, **invalid})
    assert error.value.code == 2
