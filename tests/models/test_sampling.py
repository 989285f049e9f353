"""Sampling: the same codes by each method, batch size and device; temperature, top-k and top-p."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.config import PriorConfig
from models.precision import reduced_precision_disabled
from models.priors import PRIORS, Grid, Prior, build, nll
from models.priors.cached import CachedPrior
from models.priors.layers import NO_LABEL
from models.random import GOLDEN_GAMMA, splitmix64, to_signed
from models.sampling import GumbelNoise, Sampler, SamplingRule, draw, guide

ENTRIES, CLASSES, GRID = 11, 3, (5, 7)
COARSER = {"top": Grid(5, 1, 2), "middle": Grid(7, 3, 6)}  # of a grid of 6 x 12
SAMPLE_IDS = torch.tensor([0, 1, 5])


def non_uniform(
    name: str, conditioned: bool, dtype: torch.dtype = torch.float64, /, **options: Any
) -> tuple[Prior, dict[str, Any]]:
    """Build a prior whose entries are not equally probable, and the conditions of three grids."""
    torch.manual_seed(0)
    settings = {"channels": 8, "residual_channels": 12, "layers": 4, "attention_layers": 2, "attention_heads": 2}
    settings |= {"output_layers": 1, "condition_layers": 1}
    config = PriorConfig(name, **settings, **options)  # type: ignore[arg-type]
    grid, coarser, classes = ((6, 12), COARSER, CLASSES) if conditioned else (GRID, {}, 0)
    prior = build(config, entries=ENTRIES, grid=grid, coarser=coarser, classes=classes).to(dtype).eval()
    for module in prior.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
    codes = {level: torch.randint(0, size.entries, (3, size.height, size.width)) for level, size in coarser.items()}
    return prior, {"coarser": codes, "labels": torch.tensor([0, 2, 1])} if conditioned else {}


def codes_for(prior: Prior, batch: int = 3) -> Tensor:
    return torch.randint(0, ENTRIES, (batch, prior.height, prior.width))


@torch.inference_mode()
def score_cached(
    prior: Prior, codes: Tensor, coarser: Any = None, labels: Tensor | None = None, static: bool = False
) -> Tensor:
    """Compute the logits of codes with the cached prior, position by position."""
    cache = CachedPrior(prior, batch=len(codes), static=static)
    for _ in range(2):  # the second time after a reset
        cache.reset(coarser, labels)
        rows = []
        for row in range(prior.height):
            cache.start_row(row)
            columns = []
            for column in range(prior.width):
                columns.append(cache.step(column))
                cache.append(codes[:, row, column], column)
            rows.append(torch.stack(columns, -1))
    return torch.stack(rows, -2)


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("static", [False, True])
def test_cached_logits_equal_the_networks(name: str, conditioned: bool, static: bool):
    """This holds for the growing cache, and for the static one that a CUDA graph needs."""
    prior, conditions = non_uniform(name, conditioned)
    codes = codes_for(prior)
    cached = score_cached(prior, codes, **conditions, static=static)
    torch.testing.assert_close(cached, prior(codes, **conditions).detach(), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("options", [{"gate": "tanh"}, {"conditioned": False}], ids=str)
@pytest.mark.parametrize("name", PRIORS)
def test_cached_logits_equal_the_networks_with_options(name: str, options: dict[str, Any]):
    """This holds for the other gate, and for a prior that ignores the coarser codes."""
    prior, conditions = non_uniform(name, True, **options)
    codes = codes_for(prior)
    torch.testing.assert_close(
        score_cached(prior, codes, **conditions), prior(codes, **conditions).detach(), atol=1e-12, rtol=1e-12
    )


@pytest.mark.parametrize("name", PRIORS)
def test_cached_logits_agree_in_float32(name: str):
    """They agree up to rounding."""
    prior, conditions = non_uniform(name, True, torch.float32)
    codes = codes_for(prior)
    cached = score_cached(prior, codes, **conditions)
    torch.testing.assert_close(cached, prior(codes, **conditions).detach(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("conditioned", [False, True])
def test_cached_nll_equals_the_networks(name: str, conditioned: bool):
    """This holds for drawn codes, with the caches that draw them."""
    prior, conditions = non_uniform(name, conditioned)
    codes = draw(prior, seed=1, sample_ids=SAMPLE_IDS, **conditions)
    logits, cached = prior(codes, **conditions).detach(), score_cached(prior, codes, **conditions)
    torch.testing.assert_close(nll(cached, codes), nll(logits, codes), atol=1e-10, rtol=1e-12)


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("rule", [{}, {"temperature": 0.7, "top_k": 6, "top_p": 0.9}])
def test_cached_and_naive_draw_the_same_codes(name: str, conditioned: bool, rule: dict[str, Any]):
    """Every code is equal, with and without temperature, top-k and top-p."""
    prior, conditions = non_uniform(name, conditioned)
    cached = draw(prior, seed=3, sample_ids=SAMPLE_IDS, **conditions, **rule)
    naive = draw(prior, seed=3, sample_ids=SAMPLE_IDS, **conditions, **rule, method="naive")
    assert torch.equal(cached, naive)
    assert cached.unique().numel() > 3


@pytest.mark.parametrize("name", PRIORS)
def test_guidance_draws_the_same_codes_by_each_method_and_batch(name: str):
    """The cached sampler runs both streams in one batch."""
    prior, conditions = non_uniform(name, True, label_dropout=0.1)
    guided = draw(prior, seed=3, sample_ids=SAMPLE_IDS, **conditions, guidance=3.0)
    assert not torch.equal(guided, draw(prior, seed=3, sample_ids=SAMPLE_IDS, **conditions))
    for settings in ({"method": "naive"}, {"batch_size": 2}, {"prefix": guided, "prefix_rows": 2}):
        again = draw(prior, seed=3, sample_ids=SAMPLE_IDS, **conditions, guidance=3.0, **settings)
        assert torch.equal(again, guided)


@pytest.mark.parametrize("name", PRIORS)
def test_guidance_of_zero_ignores_the_label(name: str):
    """It draws from the network without labels; with scale 1 the codes are those of no guidance."""
    prior, conditions = non_uniform(name, True, label_dropout=0.1)
    without = conditions | {"labels": torch.full((3,), NO_LABEL)}
    unlabelled = draw(prior, seed=3, sample_ids=SAMPLE_IDS, **without)
    assert torch.equal(draw(prior, seed=3, sample_ids=SAMPLE_IDS, **conditions, guidance=0.0), unlabelled)
    labelled = draw(prior, seed=3, sample_ids=SAMPLE_IDS, **conditions)
    assert not torch.equal(labelled, unlabelled)
    assert torch.equal(draw(prior, seed=3, sample_ids=SAMPLE_IDS, **conditions, guidance=1.0), labelled)


def test_guidance_raises_what_the_label_makes_more_probable():
    """The scale multiplies the difference of log-probabilities, whatever constants the logits carry."""
    labelled = torch.tensor([[0.7, 0.2, 0.1]]).log()
    unlabelled = torch.tensor([[0.4, 0.4, 0.2]]).log()
    guided = guide(torch.cat([labelled + 5, unlabelled - 3]), 2.0).softmax(-1)
    expected = (labelled.exp() ** 2 / unlabelled.exp()).double()
    torch.testing.assert_close(guided, expected / expected.sum(), atol=1e-6, rtol=0)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("conditioned", [False, True])
def test_guidance_of_a_prior_trained_with_labels_only_is_refused(conditioned: bool):
    """It has never seen a grid without a label."""
    prior, conditions = non_uniform("pixelcnn", conditioned)
    with pytest.raises(ValueError, match=r"guidance must be 1 .* got 2\.0; train it on .* label_dropout above 0"):
        draw(prior, seed=0, sample_ids=SAMPLE_IDS, **conditions, guidance=2.0)


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("conditioned", [False, True])
def test_sample_does_not_depend_on_its_batch(name: str, conditioned: bool):
    """Samples drawn alone, in another order, equal those drawn together."""
    prior, conditions = non_uniform(name, conditioned)
    together = draw(prior, seed=3, sample_ids=SAMPLE_IDS, **conditions)
    assert not torch.equal(together[0], together[1])
    for index in (2, 0, 1):
        condition = {
            key: value[[index]] if key == "labels" else select(value, index) for key, value in conditions.items()
        }
        assert torch.equal(draw(prior, seed=3, sample_ids=SAMPLE_IDS[[index]], **condition)[0], together[index])


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("method", ["cached", "naive"])
def test_batch_size_does_not_change_samples(name: str, method: Any):
    """This holds also for a smaller last batch and with a prefix."""
    prior, conditions = non_uniform(name, True)
    together = draw(prior, seed=3, sample_ids=SAMPLE_IDS, **conditions)
    assert torch.equal(draw(prior, seed=3, sample_ids=SAMPLE_IDS, **conditions, method=method, batch_size=2), together)
    prefix = {"prefix": codes_for(prior), "prefix_rows": 2}
    together = draw(prior, seed=3, sample_ids=SAMPLE_IDS, **conditions, **prefix)
    separate = draw(prior, seed=3, sample_ids=SAMPLE_IDS, **conditions, **prefix, method=method, batch_size=1)
    assert torch.equal(separate, together)


@pytest.mark.parametrize("name", PRIORS)
def test_sampler_reuses_its_caches(name: str):
    """A second draw with other sample IDs, labels, coarser codes and prefix equals that of a new sampler."""
    prior, conditions = non_uniform(name, True)
    sampler = Sampler(prior)
    first = sampler.draw(seed=3, sample_ids=SAMPLE_IDS, **conditions)
    caches = sampler._cached
    others = {
        "coarser": {level: (codes + 1) % COARSER[level].entries for level, codes in conditions["coarser"].items()},
        "labels": (conditions["labels"] + 1) % CLASSES,
    }
    again = sampler.draw(seed=4, sample_ids=SAMPLE_IDS + 7, **others)
    completed = sampler.draw(seed=3, sample_ids=SAMPLE_IDS, **conditions, prefix=again, prefix_rows=2)

    assert torch.equal(again, draw(prior, seed=4, sample_ids=SAMPLE_IDS + 7, **others))
    assert torch.equal(completed, draw(prior, seed=3, sample_ids=SAMPLE_IDS, **conditions, prefix=again, prefix_rows=2))
    assert torch.equal(sampler.draw(seed=3, sample_ids=SAMPLE_IDS, **conditions), first)
    assert sampler._cached is caches


def test_no_sample_ids_give_no_grids():
    """The result is an empty tensor of grids."""
    prior, _ = non_uniform("pixelcnn", False)
    assert draw(prior, seed=0, sample_ids=SAMPLE_IDS[:0]).shape == (0, *GRID)


def select(codes: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """Return the coarser codes of one grid."""
    return {level: grids[[index]] for level, grids in codes.items()}


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("method", ["cached", "naive"])
def test_prefix_is_copied_and_completed(name: str, method: Any):
    """A sample with its first rows as prefix is unchanged; other rows are copied and completed otherwise."""
    prior, _ = non_uniform(name, False)
    sample = draw(prior, seed=3, sample_ids=SAMPLE_IDS)
    again = draw(prior, seed=3, sample_ids=SAMPLE_IDS, prefix=sample, prefix_rows=2, method=method)
    assert torch.equal(again, sample)
    other = codes_for(prior)
    completed = draw(prior, seed=3, sample_ids=SAMPLE_IDS, prefix=other, prefix_rows=2, method=method)
    assert torch.equal(completed[:, :2], other[:, :2])
    assert not torch.equal(completed[:, 2:], sample[:, 2:])
    assert torch.equal(draw(prior, seed=3, sample_ids=SAMPLE_IDS, prefix=other, prefix_rows=5, method=method), other)


@pytest.mark.parametrize("method", ["cached", "naive"])
def test_drawing_does_not_change_the_prior(method: Any):
    """It stays in training mode, although dropout is off while drawing, and can train on the drawn codes."""
    prior, _ = non_uniform("pixelcnn", False)
    expected = draw(prior, seed=3, sample_ids=SAMPLE_IDS)
    prior.train()
    codes = draw(prior, seed=3, sample_ids=SAMPLE_IDS, method=method)
    assert torch.equal(codes, expected)
    assert prior.training
    nll(prior(codes), codes).sum().backward()


def noise_rows(entries: int, count: int) -> Tensor:
    """Return the noise of one row of many samples, (count x W, entries)."""
    prior, _ = non_uniform("pixelcnn", False)
    prior.entries = entries
    return GumbelNoise(7, torch.arange(count), prior).row(3).flatten(0, 1)


def test_splitmix64_gives_the_published_numbers():
    """They are the first outputs of the generator from seed 0."""
    counter = torch.tensor([to_signed(GOLDEN_GAMMA * count) for count in (1, 2, 3)])
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert splitmix64(counter).tolist() == [to_signed(value) for value in published]


def test_noise_has_a_gumbel_distribution_and_distinct_keys():
    """The mean is Euler's constant, the variance pi^2 / 6, and seeds, IDs, grids and positions share no value."""
    noise = noise_rows(8, 4000)
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.02)
    assert noise.isfinite().all()
    small, large = (non_uniform("pixelcnn", conditioned)[0] for conditioned in (False, True))
    rows = [
        GumbelNoise(seed, SAMPLE_IDS, prior).row(row)
        for seed in (-1, 0, 2**40)
        for prior in (small, large)
        for row in (0, 1)
    ]
    values = torch.cat([row.flatten() for row in rows])
    assert values.unique().numel() == values.numel()


def test_frequencies_of_codes_are_their_probabilities():
    """This holds also for probabilities changed by a temperature."""
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    noise = noise_rows(4, 4000)
    logits = probabilities.log().expand(len(noise), -1)
    for temperature in (1.0, 0.5, 2.0):
        drawn = SamplingRule(temperature)(logits, noise).bincount(minlength=4) / len(noise)
        expected = probabilities ** (1 / temperature)
        torch.testing.assert_close(drawn.double(), expected / expected.sum(), atol=0.01, rtol=0)


def test_top_k_keeps_the_most_probable_entries():
    """With one entry it is the argmax for any noise; ties do not add entries."""
    noise = noise_rows(4, 500)
    logits = torch.tensor([0.1, 2.0, 1.0, 1.5]).expand(len(noise), -1)
    assert SamplingRule(top_k=1)(logits, noise).unique().tolist() == [1]
    assert SamplingRule(top_k=2)(logits, noise).unique().tolist() == [1, 3]
    assert SamplingRule(top_k=9)(logits, noise).unique().tolist() == [0, 1, 2, 3]
    assert SamplingRule(top_k=3)(torch.zeros_like(logits), noise).unique().numel() == 3


def test_top_p_keeps_the_fewest_entries_of_that_probability():
    """It keeps at least one entry, and applies after the temperature and within the top k."""
    noise = noise_rows(4, 500)
    logits = torch.tensor([0.05, 0.5, 0.15, 0.3]).log().expand(len(noise), -1)
    assert SamplingRule(top_p=0.01)(logits, noise).unique().tolist() == [1]
    assert SamplingRule(top_p=0.5001)(logits, noise).unique().tolist() == [1, 3]
    assert SamplingRule(top_p=0.9)(logits, noise).unique().tolist() == [1, 2, 3]
    assert SamplingRule(top_p=0.6, temperature=0.25)(logits, noise).unique().tolist() == [1]
    assert SamplingRule(top_p=0.9, top_k=2)(logits, noise).unique().tolist() == [1, 3]


@pytest.mark.parametrize("name", PRIORS)
def test_autocast_of_the_caller_does_not_change_samples(name: str):
    """Codes drawn under bf16 autocast equal those drawn without."""
    prior, conditions = non_uniform(name, True, torch.float32)
    expected = draw(prior, seed=3, sample_ids=SAMPLE_IDS, **conditions)
    with torch.autocast("cpu", torch.bfloat16):
        for method in ("cached", "naive"):
            assert torch.equal(draw(prior, seed=3, sample_ids=SAMPLE_IDS, **conditions, method=method), expected)


def set_allow_tf32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True


def set_fp32_precision() -> None:
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "tf32"


@pytest.mark.parametrize(
    "enable_tf32",
    [lambda: None, set_allow_tf32, set_fp32_precision, lambda: torch.set_float32_matmul_precision("high")],
)
def test_tf32_is_off_while_drawing_and_restored_afterwards(enable_tf32: Callable[[], None]):
    """This holds for every way to enable it, and also if drawing fails."""
    backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn.conv]
    initial = [backend.fp32_precision for backend in backends]
    try:
        enable_tf32()
        before = [backend.fp32_precision for backend in backends]
        with pytest.raises(KeyError), reduced_precision_disabled(torch.device("cuda")):
            assert [backend.fp32_precision for backend in backends] == ["ieee", "ieee"]
            raise KeyError
        assert [backend.fp32_precision for backend in backends] == before
    finally:
        torch.set_float32_matmul_precision("highest")
        for backend, precision in zip(backends, initial, strict=True):
            backend.fp32_precision = precision


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_refused(dtype: torch.dtype):
    """The cached and the naive sampler would not draw the same codes."""
    prior, _ = non_uniform("pixelcnn", False, dtype)
    with pytest.raises(
        ValueError, match=rf"the prior's weights must be torch\.float32 .*, got {dtype}; use prior\.float"
    ):
        draw(prior, seed=0, sample_ids=SAMPLE_IDS)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "cashed"}, "method must be cached or naive, got 'cashed'"),
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        (
            {"sample_ids": SAMPLE_IDS.double()},
            "sample_ids must be torch.int64 of one axis, got torch.float64 of shape (3,); use for example "
            "torch.arange(8)",
        ),
        (
            {"prefix": torch.zeros(3, *GRID), "prefix_rows": 1},
            "prefix must be torch.int64, got torch.float32; use prefix.long()",
        ),
        ({"temperature": 0.0}, "temperature must be a number above 0, got 0.0"),
        ({"temperature": -1.0}, "temperature must be a number above 0, got -1.0"),
        ({"temperature": math.nan}, "temperature must be a number above 0, got nan"),
        ({"temperature": math.inf}, "temperature must be a number above 0, got inf"),
        ({"top_p": math.nan}, "top_p must be above 0 and at most 1, got nan"),
        ({"top_k": -1}, "top_k must be 0 or more, got -1"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"guidance": -1.0}, "guidance must be a number, 0 or more, got -1.0"),
        ({"guidance": math.nan}, "guidance must be a number, 0 or more, got nan"),
        ({"prefix_rows": 6}, "prefix_rows must be 0 to 5, the rows of the grid, got 6"),
        ({"prefix_rows": 1}, "prefix_rows must be 0 without prefix, got 1"),
        ({"labels": torch.zeros(3).long()}, "labels must be None for a prior without classes, got labels"),
        (
            {"prefix": torch.full((3, *GRID), ENTRIES), "prefix_rows": 1},
            "codes must be 0 to 10, got 0 to 11",
        ),
    ],
)
def test_invalid_argument_is_refused_with_its_rule(settings: dict[str, Any], message: str):
    """The error has the argument, the rule and the value."""
    prior, _ = non_uniform("pixelcnn", False)
    with pytest.raises(ValueError) as caught:
        draw(prior, **{"seed": 0, "sample_ids": SAMPLE_IDS, **settings})
    assert str(caught.value) == message


def test_prefix_of_another_grid_is_refused():
    """This includes one whose first rows would fit."""
    prior, _ = non_uniform("pixelcnn", False)
    other = torch.zeros(3, 5, 8, dtype=torch.int64)
    with pytest.raises(
        ValueError, match="prefix must be 3 x 5 x 7 codes, of which the first rows are read, got 3 x 5 x 8"
    ):
        draw(prior, seed=0, sample_ids=SAMPLE_IDS, prefix=other, prefix_rows=1)


@pytest.mark.gpu
@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("conditioned", [False, True])
def test_cuda_graph_draws_the_same_codes(name: str, conditioned: bool):
    """The captured step and the naive sampler on a GPU draw the codes of the cached sampler on the CPU."""
    prior, conditions = non_uniform(name, conditioned, label_dropout=0.1)
    guidance = 2.0 if conditioned else 1.0
    expected = draw(prior, seed=3, sample_ids=SAMPLE_IDS, **conditions, guidance=guidance)
    prior.cuda()
    moved: dict[str, Any] = {
        key: value.cuda() if key == "labels" else {level: grids.cuda() for level, grids in value.items()}
        for key, value in conditions.items()
    }
    for method in ("cached", "naive"):
        sampler = Sampler(prior, guidance=guidance, method=method)
        for _ in range(2):  # the second time the first graph is replayed from the first row on
            assert torch.equal(sampler.draw(seed=3, sample_ids=SAMPLE_IDS, **moved).cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", PRIORS)
def test_tf32_and_autocast_do_not_change_samples_on_a_gpu(name: str):
    """Codes drawn under both equal those drawn without."""
    prior, _ = non_uniform(name, False, torch.float32)
    prior.cuda()
    expected = draw(prior, seed=3, sample_ids=SAMPLE_IDS)
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cuda", torch.bfloat16):
            for method in ("cached", "naive"):
                assert torch.equal(draw(prior, seed=3, sample_ids=SAMPLE_IDS, method=method), expected)
    finally:
        torch.set_float32_matmul_precision("highest")
