"""params.yaml: what is wrong is named by file, key, value and fix."""

import copy
from pathlib import Path

import pytest

from pipeline import params
from stages.errors import UserError

DATA = params.read(Path(__file__).parents[2] / "params.yaml")


def refused(key: str, value: object) -> str:
    """Set a key, or remove it, and return the letter that comes."""
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


REMOVED = object()


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("train_vqvae.learing_rate", 0.1, "fix: Did you mean train_vqvae.learning_rate?"),
        ("vqvae.bta", 0.1, "fix: Did you mean vqvae.quantizer.beta?"),
        ("priors.top.network.chanels", 8, "fix: Did you mean priors.top.network.channels?"),
        ("vqvae.levels.top.entrys", 8, "fix: Did you mean vqvae.levels.top.entries?"),
        ("sed", 1, "fix: Did you mean seed?"),
        ("seed", -1, "seed is -1.\n  in: params.yaml\n  fix: Use 0 or more, below 2**63."),
        ("train_vqvae.steps", "many", 'steps is "many".\n  in: params.yaml\n  fix: Use a valid integer.'),
        ("train_vqvae.steps", "1500", 'steps is "1500".\n  in: params.yaml\n  fix: Use a valid integer.'),
        ("train_vqvae.steps", 1.5, "train_vqvae.steps is 1.5.\n  in: params.yaml\n  fix: Use a valid integer."),
        ("train_vqvae.steps", 0, "train_vqvae.steps is 0.\n  in: params.yaml\n  fix: Use 1 or more."),
        ("train_vqvae.learning_rate", float("nan"), "fix: Use a finite number."),
        ("train_vqvae.learning_rate", float("inf"), "fix: Use a finite number."),
        ("train_vqvae.learning_rate", None, "learning_rate is null.\n  in: params.yaml\n  fix: Use a valid number."),
        ("train_vqvae.learning_rate", [0.1], "learning_rate is [0.1].\n  in: params.yaml\n  fix: Use a valid number."),
        ("train_vqvae.learning_rate", -1.0, "learning_rate is -1.0.\n  in: params.yaml\n  fix: Use a positive number"),
        ("train_vqvae.schedule", "cosin", "fix: Use 'constant' or 'cosine'."),
        ("vqvae.levels.top.stride", 6, "stride is 6"),
        ("dataset", 3, "dataset is 3; it holds settings of its own."),
        ("vqvae.levels", 3, "fix: Set what it holds: vqvae.levels.LEVEL.stride, "),
        ("dataset.source", " ", "dataset.source is empty.\n  in: params.yaml\n  fix: Use a folder, a zip or a tar"),
        ("sample.top_k", 257, "fix: Use 1 to 256, or 0 to keep all."),
        ("dataset.source", REMOVED, "dataset.source is missing."),
        ("dataset.image_size", 30, "image_size is 30, which the coarsest level's stride 4 does not divide."),
        ("priors.top", REMOVED, "-S '+prior@priors.top=pixelcnn'"),
        ("vqvae.levels.top", REMOVED, "-S '~prior@priors.top'"),
        ("cluster.workers", 3, "train_vqvae.batch_size is 32, which 3 workers cannot share evenly."),
    ],
)
def test_a_mistake_is_named_with_its_fix(key, value, says):
    """Each mistake in a setting gives one letter that holds what to do."""
    assert says in refused(key, value)


NUMBERS = [key for key, value in params.flat(DATA).items() if type(value) in (int, float)]


@pytest.mark.parametrize("value", [-1, float("nan")], ids=str)
@pytest.mark.parametrize("key", NUMBERS)
def test_no_number_may_be_less_than_nothing(key, value):
    """Each setting that is a number refuses it by its name, its value and what to use."""
    letter = refused(key, value)
    assert key.rpartition(".")[2] in letter and str(value) in letter.lower() and "fix: Use " in letter


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("dataset.validation_fraction", 1.5, "Use a fraction from 0 to 1"),
        ("dataset.jpeg_quality", 101, "Use 1 to 100"),
        ("train_vqvae.warmup_steps", 10**6, "Use 0 up to steps"),
        ("train_vqvae.ema_decay", 1.0, "ema_decay below 1"),
        ("sample.top_p", 1.1, "top_p above 0 up to 1"),
        ("vqvae.quantizer.decay", 1.0, "up to, but not, 1"),
        ("vqvae.quantizer.revive_below", 1.0, "a share from 0 up to 1"),
        ("vqvae.level_dropout", 1.0, "up to, but not, 1"),
        ("vqvae.levels.top.entries", 1, "Use 2 or more"),
        ("vqvae.levels.top.entries", 65_537, "use at most 65536"),
        ("vqvae.levels.top.stride", 2, "List levels coarse to fine"),
        ("vqvae.levels", {}, "Name at least one, such as top: {stride: 8}"),
        ("priors.top.network.attention_layers", 7, "Use a multiple of 7"),
        ("priors.top.network.kernel_size", 4, "Use an odd side of 3 or more"),
        ("zzz", 1, "fix: Remove zzz."),
    ],
)
def test_what_is_too_much_is_refused_with_what_may_be(key, value, says):
    """Each range has an upper end, too."""
    assert says.lower() in refused(key, value).lower()


def test_several_mistakes_come_in_one_letter():
    """All unknown keys are told at once."""
    data = {**copy.deepcopy(DATA), "sed": 1, "dateset": {}}
    with pytest.raises(UserError) as error:
        params.check(data)
    assert "sed is not a setting." in str(error.value) and "dateset is not a setting." in str(error.value)


def test_priors_come_coarse_to_fine_whatever_the_order_in_the_file():
    """The order of levels is that of vqvae.levels."""
    data = {**copy.deepcopy(DATA), "priors": dict(reversed(DATA["priors"].items()))}
    assert list(params.check(data).priors) == ["top", "bottom"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"seed: 1\nseed: 2\n", "duplicate key"),
        (b"seed: 1\n\tx: 2\n", "line 2"),
        (b"<<<<<<< HEAD\nseed: 1\n=======\nseed: 2\n>>>>>>> other\n", "not valid YAML"),
        ("seed: 1".encode("utf-16"), "not UTF-8"),
        (b"", "holds no settings"),
        (b"- 1\n", "holds no settings"),
        (b"x: " + b"y" * params.MAX_BYTES, "bytes"),
        (b"a: &a [x, x]\nb: &b [*a, *a]\n", "aliases are not read"),
        (b"a: &a [*a]\n", "aliases are not read"),
        (b"a: " + b"{a: " * 2000, "not valid YAML"),
        (b"a: !!int x\n", "not valid YAML"),
        (b"a: 2026-13-01\n", "not valid YAML"),
        (b"a: !!python/object/apply:os.abort []\n", "could not determine a constructor"),
    ],
    ids=["duplicate", "tab", "merge", "utf16", "empty", "list", "huge", "bomb", "loop", "deep", "int", "date", "code"],
)
def test_a_file_that_is_no_settings_is_refused(tmp_path, text, says):
    """What cannot be read as settings is said to be so, with the line where there is one."""
    path = tmp_path / "params.yaml"
    path.write_bytes(text)
    with pytest.raises(UserError, match=says) as error:
        params.read(path)
    assert error.value.code == 2 and str(path) in error.value.where


@pytest.mark.parametrize(
    "odd", [{("a", "b"): 1}, {"seed": 10**5000}, {"seed": "\ud800"}], ids=["key", "digits", "half"]
)
def test_settings_that_are_no_plain_data_are_refused(odd):
    """YAML knows keys, numbers and characters that settings cannot have."""
    with pytest.raises(UserError, match="hold what JSON cannot") as error:
        params.check({**DATA, **odd})
    assert error.value.code == 2


def test_flat_names_every_setting_in_full():
    """Nested settings become one level of full names."""
    assert params.flat({"a": {"b": {"c": 1}}, "d": []}) == {"a.b.c": 1, "d": []}
