"""Promises of drawing: exact, the same whoever draws, and what temperature, top-k and top-p mean."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.config import PriorConfig
from models.priors import PRIORS, Grid, Prior, build, nll
from models.priors.cached import CachedPrior
from models.sampling import GOLDEN, Choice, Noise, Sampler, _exact, _mix, _signed, draw

ENTRIES, CLASSES, GRID = 11, 3, (5, 7)
COARSER = {"top": Grid(5, 1, 2), "middle": Grid(7, 3, 6)}  # of a grid of 6 x 12
NUMBERS = torch.tensor([0, 1, 5])


def opinionated(name: str, conditioned: bool, dtype: torch.dtype = torch.float64) -> tuple[Prior, dict[str, Any]]:
    """A prior that does not hold all entries equal, as an untrained one would, and the conditions of three grids."""
    torch.manual_seed(0)
    settings = {"channels": 8, "residual_channels": 12, "layers": 4, "attention_layers": 2, "attention_heads": 2}
    config = PriorConfig(name, **settings, output_layers=1, condition_layers=1)  # type: ignore[arg-type]
    grid, coarser, classes = ((6, 12), COARSER, CLASSES) if conditioned else (GRID, {}, 0)
    prior = build(config, entries=ENTRIES, grid=grid, coarser=coarser, classes=classes).to(dtype).eval()
    for module in prior.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
    given = {level: torch.randint(0, each.entries, (3, each.height, each.width)) for level, each in coarser.items()}
    return prior, {"coarser": given, "labels": torch.tensor([0, 2, 1])} if conditioned else {}


def codes_for(prior: Prior, batch: int = 3) -> Tensor:
    return torch.randint(0, ENTRIES, (batch, prior.height, prior.width))


@torch.inference_mode()
def score_cached(
    prior: Prior, codes: Tensor, coarser: Any = None, labels: Tensor | None = None, static: bool = False
) -> Tensor:
    """Score given codes with the caches that draw them, position by position."""
    cache = CachedPrior(prior, batch=len(codes), static=static)
    for _ in range(2):  # the second time they begin anew
        cache.begin(coarser, labels)
        rows = []
        for row in range(prior.height):
            cache.start_row(row)
            columns = []
            for column in range(prior.width):
                columns.append(cache.step(column))
                cache.absorb(codes[:, row, column], column)
            rows.append(torch.stack(columns, -1))
    return torch.stack(rows, -2)


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("static", [False, True])
def test_cached_logits_are_the_networks_at_every_position(name: str, conditioned: bool, static: bool):
    """In both shapes of the cache: the growing one, and the fixed one that a CUDA graph records."""
    prior, conditions = opinionated(name, conditioned)
    codes = codes_for(prior)
    cached = score_cached(prior, codes, **conditions, static=static)
    torch.testing.assert_close(cached, prior(codes, **conditions).detach(), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", PRIORS)
def test_cached_logits_agree_in_single_precision(name: str):
    """To the rounding of float32."""
    prior, conditions = opinionated(name, True, torch.float32)
    codes = codes_for(prior)
    cached = score_cached(prior, codes, **conditions)
    torch.testing.assert_close(cached, prior(codes, **conditions).detach(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("conditioned", [False, True])
def test_likelihood_accumulates_to_that_scored_in_parallel(name: str, conditioned: bool):
    """Of drawn codes, by the caches that drew them."""
    prior, conditions = opinionated(name, conditioned)
    codes = draw(prior, seed=1, numbers=NUMBERS, **conditions)
    parallel, accumulated = prior(codes, **conditions).detach(), score_cached(prior, codes, **conditions)
    torch.testing.assert_close(nll(accumulated, codes), nll(parallel, codes), atol=1e-10, rtol=1e-12)


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("choice", [{}, {"temperature": 0.7, "top_k": 6, "top_p": 0.9}])
def test_cached_and_naive_draw_the_same_codes(name: str, conditioned: bool, choice: dict[str, Any]):
    """With the same noise, to the last code."""
    prior, conditions = opinionated(name, conditioned)
    cached = draw(prior, seed=3, numbers=NUMBERS, **conditions, **choice)
    naive = draw(prior, seed=3, numbers=NUMBERS, **conditions, **choice, method="naive")
    assert torch.equal(cached, naive)
    assert cached.unique().numel() > 3


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("conditioned", [False, True])
def test_a_sample_does_not_depend_on_its_batch(name: str, conditioned: bool):
    """Drawn together, alone, or in another order: a sample is its seed and number."""
    prior, conditions = opinionated(name, conditioned)
    together = draw(prior, seed=3, numbers=NUMBERS, **conditions)
    assert not torch.equal(together[0], together[1])
    for i in (2, 0, 1):
        mine = {key: value[[i]] if key == "labels" else pick(value, i) for key, value in conditions.items()}
        assert torch.equal(draw(prior, seed=3, numbers=NUMBERS[[i]], **mine)[0], together[i])


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("method", ["cached", "naive"])
def test_many_samples_are_drawn_a_few_at_a_time_and_are_the_same(name: str, method: Any):
    """Batches bound the memory; the last, smaller one included, they change no code."""
    prior, conditions = opinionated(name, True)
    together = draw(prior, seed=3, numbers=NUMBERS, **conditions)
    assert torch.equal(draw(prior, seed=3, numbers=NUMBERS, **conditions, method=method, batch_size=2), together)
    other = codes_for(prior)
    whole = draw(prior, seed=3, numbers=NUMBERS, **conditions, given=other, given_rows=2)
    parts = draw(prior, seed=3, numbers=NUMBERS, **conditions, given=other, given_rows=2, method=method, batch_size=1)
    assert torch.equal(parts, whole)


@pytest.mark.parametrize("name", PRIORS)
def test_a_sampler_draws_again_from_the_caches_it_has(name: str):
    """Other numbers, labels, coarser codes and given rows than before, and nothing of before shows."""
    prior, conditions = opinionated(name, True)
    sampler = Sampler(prior)
    first = sampler.draw(seed=3, numbers=NUMBERS, **conditions)
    caches = sampler._cached
    others = {
        "coarser": {level: (codes + 1) % COARSER[level].entries for level, codes in conditions["coarser"].items()},
        "labels": (conditions["labels"] + 1) % CLASSES,
    }
    again = sampler.draw(seed=4, numbers=NUMBERS + 7, **others)
    completed = sampler.draw(seed=3, numbers=NUMBERS, **conditions, given=again, given_rows=2)

    assert torch.equal(again, draw(prior, seed=4, numbers=NUMBERS + 7, **others))
    assert torch.equal(completed, draw(prior, seed=3, numbers=NUMBERS, **conditions, given=again, given_rows=2))
    assert torch.equal(sampler.draw(seed=3, numbers=NUMBERS, **conditions), first)
    assert sampler._cached is caches


def test_no_samples_are_no_grids():
    """An empty request is answered with an empty tensor of grids."""
    prior, _ = opinionated("pixelcnn", False)
    assert draw(prior, seed=0, numbers=NUMBERS[:0]).shape == (0, *GRID)


def pick(codes: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    """The coarser codes of one grid."""
    return {level: each[[i]] for level, each in codes.items()}


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("method", ["cached", "naive"])
def test_given_rows_are_kept_and_completed(name: str, method: Any):
    """Given its own upper part a sample completes to itself; given another part, that part stays."""
    prior, _ = opinionated(name, False)
    whole = draw(prior, seed=3, numbers=NUMBERS)
    again = draw(prior, seed=3, numbers=NUMBERS, given=whole, given_rows=2, method=method)
    assert torch.equal(again, whole)
    other = codes_for(prior)
    completed = draw(prior, seed=3, numbers=NUMBERS, given=other, given_rows=2, method=method)
    assert torch.equal(completed[:, :2], other[:, :2])
    assert not torch.equal(completed[:, 2:], whole[:, 2:])
    assert torch.equal(draw(prior, seed=3, numbers=NUMBERS, given=other, given_rows=5, method=method), other)


@pytest.mark.parametrize("method", ["cached", "naive"])
def test_drawing_leaves_the_prior_as_it_was(method: Any):
    """Training stays on, though dropout is off while drawing; codes are plain tensors."""
    prior, _ = opinionated("pixelcnn", False)
    expected = draw(prior, seed=3, numbers=NUMBERS)
    prior.train()
    codes = draw(prior, seed=3, numbers=NUMBERS, method=method)
    assert torch.equal(codes, expected)
    assert prior.training
    nll(prior(codes), codes).sum().backward()


def noise_rows(entries: int, count: int) -> Tensor:
    """A lot of noise, as draws use it."""
    prior, _ = opinionated("pixelcnn", False)
    prior.entries = entries
    return Noise(7, torch.arange(count), prior).row(3).flatten(0, 1)


def test_scrambling_is_that_of_splitmix64():
    """The first numbers of the published generator, from seed 0."""
    counter = torch.tensor([_signed(GOLDEN * i) for i in (1, 2, 3)])
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert _mix(counter).tolist() == [_signed(value) for value in published]


def test_noise_is_gumbels_and_differs_by_seed_number_grid_and_position():
    """Its mean is Euler's constant and its variance pi^2 / 6; no two keys share a value."""
    noise = noise_rows(8, 4000)
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.02)
    assert noise.isfinite().all()
    small, large = (opinionated("pixelcnn", conditioned)[0] for conditioned in (False, True))
    rows = [
        Noise(seed, NUMBERS, prior).row(row) for seed in (-1, 0, 2**40) for prior in (small, large) for row in (0, 1)
    ]
    values = torch.cat([row.flatten() for row in rows])
    assert values.unique().numel() == values.numel()


def test_codes_come_as_often_as_their_probabilities_say():
    """Also under a temperature, which flattens or sharpens them."""
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    noise = noise_rows(4, 4000)
    logits = probabilities.log().expand(len(noise), -1)
    for temperature in (1.0, 0.5, 2.0):
        drawn = Choice(temperature)(logits, noise).bincount(minlength=4) / len(noise)
        expected = probabilities ** (1 / temperature)
        torch.testing.assert_close(drawn.double(), expected / expected.sum(), atol=0.01, rtol=0)


def test_top_k_keeps_the_likeliest_entries_and_no_others():
    """One entry is the argmax whatever the noise; ties do not let more in."""
    noise = noise_rows(4, 500)
    logits = torch.tensor([0.1, 2.0, 1.0, 1.5]).expand(len(noise), -1)
    assert Choice(top_k=1)(logits, noise).unique().tolist() == [1]
    assert Choice(top_k=2)(logits, noise).unique().tolist() == [1, 3]
    assert Choice(top_k=9)(logits, noise).unique().tolist() == [0, 1, 2, 3]
    assert Choice(top_k=3)(torch.zeros_like(logits), noise).unique().numel() == 3


def test_top_p_keeps_the_smallest_set_that_holds_the_probability():
    """At least one entry; counted after the temperature and within the top k."""
    noise = noise_rows(4, 500)
    logits = torch.tensor([0.05, 0.5, 0.15, 0.3]).log().expand(len(noise), -1)
    assert Choice(top_p=0.01)(logits, noise).unique().tolist() == [1]
    assert Choice(top_p=0.5001)(logits, noise).unique().tolist() == [1, 3]
    assert Choice(top_p=0.9)(logits, noise).unique().tolist() == [1, 2, 3]
    assert Choice(top_p=0.6, temperature=0.25)(logits, noise).unique().tolist() == [1]
    assert Choice(top_p=0.9, top_k=2)(logits, noise).unique().tolist() == [1, 3]


@pytest.mark.parametrize("name", PRIORS)
def test_the_callers_autocast_changes_nothing(name: str):
    """Codes drawn under bf16 autocast are those drawn without."""
    prior, conditions = opinionated(name, True, torch.float32)
    expected = draw(prior, seed=3, numbers=NUMBERS, **conditions)
    with torch.autocast("cpu", torch.bfloat16):
        for method in ("cached", "naive"):
            assert torch.equal(draw(prior, seed=3, numbers=NUMBERS, **conditions, method=method), expected)


def by_old_switches() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True


def by_new_switches() -> None:
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "tf32"


@pytest.mark.parametrize(
    "turn_on", [lambda: None, by_old_switches, by_new_switches, lambda: torch.set_float32_matmul_precision("high")]
)
def test_tf32_is_off_while_drawing_and_afterwards_as_it_was(turn_on: Callable[[], None]):
    """Whichever way the caller turned it on, and also when drawing fails."""
    switches: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn.conv]
    untouched = [switch.fp32_precision for switch in switches]
    try:
        turn_on()
        before = [switch.fp32_precision for switch in switches]
        with pytest.raises(KeyError), _exact(torch.device("cuda")):
            assert [switch.fp32_precision for switch in switches] == ["ieee", "ieee"]
            raise KeyError
        assert [switch.fp32_precision for switch in switches] == before
    finally:
        torch.set_float32_matmul_precision("highest")
        for switch, precision in zip(switches, untouched, strict=True):
            switch.fp32_precision = precision


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rough_weights_are_refused(dtype: torch.dtype):
    """In them a cached sample and a naive one would not be the same."""
    prior, _ = opinionated("pixelcnn", False, dtype)
    with pytest.raises(ValueError, match=rf"the prior's weights are {dtype}, .*; use torch\.float32"):
        draw(prior, seed=0, numbers=NUMBERS)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "cashed"}, "method is 'cashed'; use cached or naive"),
        ({"batch_size": 0}, "batch_size is 0; use 1 or more grids at once"),
        (
            {"numbers": NUMBERS.double()},
            "sample numbers are torch.float64 of shape (3,); use torch.int64, one for each grid, such as "
            "torch.arange(8)",
        ),
        (
            {"given": torch.zeros(3, *GRID), "given_rows": 1},
            "the given codes are torch.float32; use torch.int64, such as codes.long()",
        ),
        ({"temperature": 0.0}, "temperature is 0.0; use a positive number"),
        ({"temperature": -1.0}, "temperature is -1.0; use a positive number"),
        ({"temperature": math.nan}, "temperature is nan; use a positive number"),
        ({"temperature": math.inf}, "temperature is inf; use a positive number"),
        ({"top_p": math.nan}, "top_k is 0 and top_p nan; use top_k 0 or more, top_p above 0 up to 1"),
        ({"top_k": -1}, "top_k is -1 and top_p 1.0; use top_k 0 or more, top_p above 0 up to 1"),
        ({"top_p": 0.0}, "top_k is 0 and top_p 0.0; use top_k 0 or more, top_p above 0 up to 1"),
        ({"given_rows": 6}, "given_rows is 6; use 0 to 5, the rows of the grid"),
        ({"given_rows": 1}, "given_rows is 1 and there are no codes; give codes to complete, or 0 rows"),
        ({"labels": torch.zeros(3).long()}, "labels were given; this prior was trained without, so leave them out"),
        (
            {"given": torch.full((3, *GRID), ENTRIES), "given_rows": 1},
            "codes run from 0 to 11; use 0 to 10",
        ),
    ],
)
def test_settings_that_mean_nothing_are_refused_in_one_sentence(settings: dict[str, Any], message: str):
    """Before anything is drawn."""
    prior, _ = opinionated("pixelcnn", False)
    with pytest.raises(ValueError) as caught:
        draw(prior, **{"seed": 0, "numbers": NUMBERS, **settings})
    assert str(caught.value) == message


def test_a_given_grid_of_another_size_is_refused():
    """Also one whose given rows would fit."""
    prior, _ = opinionated("pixelcnn", False)
    other = torch.zeros(3, 5, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match="the given codes are 3 x 5 x 8; give 3 x 5 x 7, of which only"):
        draw(prior, seed=0, numbers=NUMBERS, given=other, given_rows=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the captured step cannot be run here")
@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("conditioned", [False, True])
def test_a_cuda_graph_draws_the_same_codes(name: str, conditioned: bool):
    """The captured step on the GPU, the naive sampler there, and the caches on the CPU: one and the same sample."""
    prior, conditions = opinionated(name, conditioned)
    expected = draw(prior, seed=3, numbers=NUMBERS, **conditions)
    prior.cuda()
    moved: dict[str, Any] = {
        key: value.cuda() if key == "labels" else {level: each.cuda() for level, each in value.items()}
        for key, value in conditions.items()
    }
    for method in ("cached", "naive"):
        sampler = Sampler(prior, method=method)
        for _ in range(2):  # the second time the first graph is replayed from the first row on
            assert torch.equal(sampler.draw(seed=3, numbers=NUMBERS, **moved).cpu(), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: there is no TF32 to keep out")
@pytest.mark.parametrize("name", PRIORS)
def test_tf32_and_autocast_change_no_code_on_a_gpu(name: str):
    """A caller who trains under both draws what one without them draws."""
    prior, _ = opinionated(name, False, torch.float32)
    prior.cuda()
    expected = draw(prior, seed=3, numbers=NUMBERS)
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cuda", torch.bfloat16):
            for method in ("cached", "naive"):
                assert torch.equal(draw(prior, seed=3, numbers=NUMBERS, method=method), expected)
    finally:
        torch.set_float32_matmul_precision("highest")
