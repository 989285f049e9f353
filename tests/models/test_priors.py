"""Promises of every prior in the table: what a position may see, what it does see, and what it costs."""

import math
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, multiprocessing, nn
from torch.nn import functional as F

from models.config import PriorConfig
from models.cost import forward_flops, parameters
from models.priors import PRIORS, Grid, Prior, build, nll
from models.priors.layers import causal, horizontal, vertical

ENTRIES, CLASSES, GRID = 11, 3, (5, 7)
COARSER = {"top": Grid(5, 2, 3), "middle": Grid(7, 4, 6)}  # of a grid of 8 x 12


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def config(name: str, **settings: Any) -> PriorConfig:
    """A prior of 8 channels whose four blocks carry two attentions."""
    small = {"channels": 8, "residual_channels": 12, "layers": 4, "attention_layers": 2, "attention_heads": 2}
    return PriorConfig(name, **{**small, "output_layers": 1, "condition_layers": 2, **settings})


def plain(name: str, grid: tuple[int, int] = GRID, **settings: Any) -> Prior:
    """A prior without conditions, in double precision, as it is used."""
    return build(config(name, **settings), entries=ENTRIES, grid=grid, coarser={}, classes=0).double().eval()


def conditioned(name: str) -> Prior:
    """A prior under two coarser levels and a label."""
    return build(config(name), entries=ENTRIES, grid=(8, 12), coarser=COARSER, classes=CLASSES).double().eval()


def codes_of(grid: tuple[int, int], batch: int = 2, entries: int = ENTRIES) -> Tensor:
    return torch.randint(0, entries, (batch, *grid))


def coarser_of(batch: int = 2) -> dict[str, Tensor]:
    return {name: codes_of((grid.height, grid.width), batch, grid.entries) for name, grid in COARSER.items()}


def seen(prior: Prior, module: nn.Module, *inputs: Any) -> Tensor:
    """Which outputs of `module` move the logits at each position: positions x the output's positions."""
    kept: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, __, output: kept.append(output))
    logits = prior(*inputs)
    handle.remove()
    weighted = (logits * torch.randn(logits.shape[1], 1, 1)).sum((0, 1)).flatten()
    rows = [torch.autograd.grad(each, kept[0], retain_graph=True)[0] for each in weighted]
    return torch.stack([row.ne(0).any(-1).any(0).flatten() for row in rows])


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("attention_layers", [0, 2])
def test_no_position_sees_itself_or_a_later_one(name: str, attention_layers: int):
    """By gradient, over all pairs of positions of a grid that is not square."""
    prior = plain(name, attention_layers=attention_layers)
    assert not seen(prior, prior.embedding, codes_of(GRID, 1)).triu().any()


@pytest.mark.parametrize(("name", "attention_layers"), [("pixelsnail", 1), ("pixelcnn", 0), ("pixelcnn", 1)])
def test_every_earlier_position_is_seen(name: str, attention_layers: int):
    """PixelSNAIL sees all through attention; the two stacks have no blind spot."""
    prior = plain(name, attention_layers=attention_layers)
    every = torch.ones(35, 35, dtype=torch.bool).tril(-1)
    assert torch.equal(seen(prior, prior.embedding, codes_of(GRID, 1)), every)


def test_two_stacks_see_a_rectangle_that_grows_with_the_layers():
    """Two more rows up and two more columns to each side per layer, after two from the stem; nothing beyond."""
    height, width = grid = (8, 13)
    prior = plain("pixelcnn", grid, layers=1, attention_layers=0)
    positions = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    up, left = (positions[:, None] - positions[None]).unbind(-1)
    reach = (up > 0) & (up <= 4) & (left.abs() <= 4) | (up == 0) & (left > 0) & (left <= 4)
    assert torch.equal(seen(prior, prior.embedding, codes_of(grid, 1)), reach)


@pytest.mark.parametrize("name", PRIORS)
def test_every_position_sees_every_coarser_level_and_the_label(name: str):
    """Each position's logits move with the coarser codes at its own place, and with the class of every block."""
    prior = conditioned(name)
    inputs = codes_of((8, 12), 1), coarser_of(1), torch.tensor([1])
    for level, grid in COARSER.items():
        rows = torch.arange(8) * grid.height // 8
        columns = torch.arange(12) * grid.width // 12
        above = (rows[:, None] * grid.width + columns).flatten()
        assert seen(prior, prior.conditioning.embeddings[level], *inputs)[torch.arange(96), above].all()
    for block in [*prior.blocks, *(prior.vertical.blocks if prior.vertical else [])]:
        assert seen(prior, block.label, *inputs).all()


@pytest.mark.parametrize("name", PRIORS)
def test_another_label_or_coarser_code_gives_other_logits_everywhere(name: str):
    """Conditions are used, not merely accepted."""
    prior = conditioned(name)
    codes, coarser = codes_of((8, 12)), coarser_of()
    base = prior(codes, coarser, torch.tensor([0, 0]))
    assert (prior(codes, coarser, torch.tensor([1, 2])) != base).any(1).all()
    others = {level: (given + 1) % COARSER[level].entries for level, given in coarser.items()}
    assert (prior(codes, others, torch.tensor([0, 0])) != base).any(1).all()


@pytest.mark.parametrize("name", PRIORS)
def test_an_untrained_prior_holds_every_entry_about_equally_likely(name: str):
    """The first loss is that of guessing, within two percent."""
    prior = build(config(name, channels=64), entries=512, grid=GRID, coarser={}, classes=0)
    codes = codes_of(GRID, 4, 512)
    assert nll(prior(codes), codes).mean().item() / 35 == pytest.approx(math.log(512), rel=0.02)


@pytest.mark.parametrize("name", PRIORS)
def test_every_parameter_learns(name: str):
    """Nothing is built that the loss does not reach: DDP would wait for it."""
    prior = conditioned(name).train()
    codes = codes_of((8, 12))
    nll(prior(codes, coarser_of(), torch.tensor([0, 2])), codes).sum().backward()
    assert [key for key, each in prior.named_parameters() if each.grad is None or not each.grad.any()] == []


@pytest.mark.parametrize("name", PRIORS)
def test_dropout_acts_in_training_only(name: str):
    """Two scorings in evaluation agree to the bit, two in training do not."""
    prior, codes = plain(name, dropout=0.5), codes_of(GRID)
    for each in prior.attentions:
        nn.init.normal_(each.merge.second.weight)
    assert torch.equal(prior(codes), prior(codes))
    prior.train()
    assert not torch.equal(prior(codes), prior(codes))


@pytest.mark.parametrize("name", PRIORS)
def test_a_part_of_the_rows_scores_as_the_whole_grid_does(name: str):
    """What is above does not depend on whether there is anything below."""
    prior, codes = plain(name), codes_of(GRID)
    torch.testing.assert_close(prior.score(codes[:, :3], None, None), prior(codes)[:, :, :3])


def test_likelihood_sums_over_positions_in_nats():
    """nll is the sum of -log softmax at the codes, in float32 or better whatever the logits are."""
    logits, codes = torch.randn(2, ENTRIES, *GRID), codes_of(GRID)
    expected = -logits.log_softmax(1).gather(1, codes[:, None]).sum((1, 2, 3))
    torch.testing.assert_close(nll(logits, codes), expected)
    assert nll(logits.bfloat16(), codes).dtype == torch.float32
    assert nll(logits.double(), codes).dtype == torch.float64


@pytest.mark.parametrize("name", PRIORS)
def test_logits_keep_full_precision_under_autocast(name: str):
    """The head and the loss stay float32 while the blocks run in bfloat16."""
    prior = build(config(name), entries=ENTRIES, grid=GRID, coarser={}, classes=0)
    codes = codes_of(GRID)
    with torch.autocast("cpu", torch.bfloat16):
        logits = prior(codes)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, prior(codes), atol=0.05, rtol=0)


def learnt_from(forward: Any, prior: Prior, device: str = "cpu") -> tuple[float, Tensor]:
    """The loss of one step, and the gradient of the embedding, which every layer shapes."""
    torch.manual_seed(1)
    codes, labels = codes_of((8, 12)).to(device), torch.tensor([0, 2], device=device)
    coarser = {name: each.to(device) for name, each in coarser_of().items()}
    prior.zero_grad()
    loss = nll(forward(codes, coarser, labels), codes).mean()
    loss.backward()
    gradient = prior.embedding.weight.grad
    assert gradient is not None
    return loss.item(), gradient.clone()


@pytest.mark.parametrize("name", PRIORS)
def test_a_step_under_bf16_autocast_learns_what_one_in_full_precision_does(name: str):
    """Conditions and labels included: the same loss to a percent, a gradient of the same direction, all in float32."""
    prior = conditioned(name).float()
    loss, gradient = learnt_from(prior, prior)
    with torch.autocast("cpu", torch.bfloat16):
        rough_loss, rough_gradient = learnt_from(prior, prior)
    assert rough_loss == pytest.approx(loss, rel=0.01)
    assert F.cosine_similarity(gradient.flatten(), rough_gradient.flatten(), dim=0) > 0.99
    assert {each.grad.dtype for each in prior.parameters() if each.grad is not None} == {torch.float32}


def compile_and_compare(rank: int, name: str, backend: str, **settings: int) -> None:
    """Take a step of a prior compiled and not."""
    torch.manual_seed(0)
    prior = build(config(name, **settings), entries=ENTRIES, grid=(8, 12), coarser=COARSER, classes=CLASSES).eval()
    compiled = torch.compile(prior, fullgraph=True, backend=backend)
    loss, gradient = learnt_from(prior, prior)
    fast_loss, fast_gradient = learnt_from(compiled, prior)
    assert fast_loss == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(fast_gradient, gradient, rtol=1e-3, atol=1e-5)
    if backend == "aot_eager":
        with torch.autocast("cpu", torch.bfloat16):
            rough_loss, rough_gradient = learnt_from(compiled, prior)
        assert rough_loss == pytest.approx(loss, rel=0.01)
        assert F.cosine_similarity(gradient.flatten(), rough_gradient.flatten(), dim=0) > 0.99


def compile_to_kernels(rank: int) -> None:
    """One block and one attention hold every kind of layer, and take no longer to compile than a test may."""
    compile_and_compare(rank, "pixelsnail", "inductor", layers=1, attention_layers=1, condition_layers=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", PRIORS)
def test_a_prior_is_one_graph_that_learns_the_same(name: str):
    """Nothing breaks the graph, and as a graph it gives the same loss and gradient, under bf16 autocast too."""
    # A process in which shapes are not checked: dynamo cannot follow the checks.
    multiprocessing.spawn(compile_and_compare, (name, "aot_eager"), nprocs=1)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler: torch.compile cannot build for this CPU")
def test_a_compiled_prior_learns_the_same():
    """The kernels made of the graph give the same loss and gradient."""
    multiprocessing.spawn(compile_to_kernels, nprocs=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: its kernels cannot be run here")
@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("name", PRIORS)
def test_a_gpu_learns_what_the_cpu_does(name: str):
    """Plain, compiled, and under bf16 autocast."""
    prior = conditioned(name).float()
    loss, gradient = learnt_from(prior, prior)
    prior.cuda()
    for forward in (prior, torch.compile(prior)):
        gpu_loss, gpu_gradient = learnt_from(forward, prior, "cuda")
        assert gpu_loss == pytest.approx(loss, rel=1e-4)
        torch.testing.assert_close(gpu_gradient.cpu(), gradient, rtol=1e-2, atol=1e-3)
        with torch.autocast("cuda", torch.bfloat16):
            assert learnt_from(forward, prior, "cuda")[0] == pytest.approx(loss, rel=0.01)


@pytest.mark.parametrize(
    ("make", "strict", "live"),
    [
        (causal, False, 13),
        (causal, True, 12),
        (vertical, False, 15),
        (vertical, True, 10),
        (horizontal, False, 3),
        (horizontal, True, 2),
    ],
)
def test_a_raster_convolution_is_a_masked_one_without_the_mask(make: Any, strict: bool, live: int):
    """It equals the usual k x k convolution whose other taps are zero, and stores the live taps only."""
    conv = make(3, 4, 5, strict=strict)
    assert conv.weight.shape == (4, 3, live)
    dense = torch.zeros(4, 3, 5, 5)
    window = conv.kernel.detach()
    dense[:, :, 3 - window.shape[2] : 3, : window.shape[3]] = window
    x = torch.randn(2, *GRID, 3)
    usual = F.conv2d(x.permute(0, 3, 1, 2), dense, conv.bias, padding=2)
    torch.testing.assert_close(conv(x), usual.permute(0, 2, 3, 1))


PAPER_TOP = {"channels": 512, "residual_channels": 2048, "layers": 20, "attention_layers": 4, "output_layers": 20}
PAPER_BOTTOM = {"channels": 512, "residual_channels": 1024, "layers": 20, "attention_layers": 0, "output_layers": 0}


def paper(name: str, settings: dict[str, int], grid: int, coarser: dict[str, Grid]) -> tuple[int, float]:
    """Parameters and forward TFLOP of a prior of the paper for ImageNet, counted without building it."""
    with torch.device("meta"):
        prior = build(PriorConfig(name, **settings), entries=512, grid=(grid, grid), coarser=coarser, classes=1000)
        inputs = (
            torch.zeros(1, grid, grid, dtype=torch.int64),
            {level: torch.zeros(1, each.height, each.width, dtype=torch.int64) for level, each in coarser.items()},
            torch.zeros(1, dtype=torch.int64),
        )
        return parameters(prior), forward_flops(lambda: prior(*inputs)) / 1e12


def test_the_top_prior_of_the_paper_has_the_size_derived_from_its_table():
    """415.5 M weights by the reading of 13 live taps and a 1x1; ours differs from it by named pieces, 0.2 % in all."""
    c, r, k = 512, 2048, 512
    table = k * c + 13 * c * c + 20 * (13 * c * r + 2 * r * c + 1000 * 2 * c) + 4 * (4 * c * c + 9 * c * c)
    table += 20 * (c * r + 2 * r * c) + c * k
    assert table == 415_531_008
    pieces = {
        "the stem is strict, one tap less": -c * c,
        "the raw code enters the keys by a layer of its own": 4 * c * c,
        "position channels, at the stem, the queries and the keys": 2 * c + 4 * 2 * 2 * c,
        "biases": c + 20 * (r + 2 * c) + 4 * 3 * 3 * c + 20 * (r + 2 * c) + k,
    }
    count, teraflop = paper("pixelsnail", PAPER_TOP, 32, {})
    assert count == table + sum(pieces.values()) == 416_468_992
    assert teraflop == pytest.approx(0.906, abs=0.001)  # 0.82 were dead taps, 2 of 15, free


def test_the_bottom_prior_of_the_paper_has_the_size_derived_from_its_table():
    """299.4 M weights for one stack; the second stack, which closes the blind spot, adds 115 M."""
    c, r, k = 512, 1024, 512
    one_stack = k * c + 13 * c * c + 20 * (13 * c * r + 2 * r * c + 1000 * 2 * c + 2 * c * c) + c * k
    table = one_stack + 9 * c * c + 20 * (9 * c * r + r * c)
    assert table == 299_401_216
    shared = {
        "the coarser codes have an embedding": k * c,
        "a transposed convolution lifts the coarser map": 16 * c * c + c,
        "position channels": 2 * c,
        "biases": c + 20 * (r + 2 * c) + k + c + 20 * (r + c),
    }
    coarser = {"top": Grid(512, 32, 32)}
    count, _ = paper("pixelsnail", PAPER_BOTTOM, 64, coarser)
    assert count == table - c * c + sum(shared.values()) == 303_670_272
    second = {
        "stem: 10 + 2 taps for 12": c,
        "blocks: 15 + 3 taps for 13": 20 * 5 * c * r,
        "the vertical stack's own second layers": 20 * (2 * r * c + r + 2 * c),
        "its own conditions and labels": 20 * (2 * c * c + 1000 * 2 * c),
        "from the vertical to the horizontal stack": 20 * c * r,
    }
    count, teraflop = paper("pixelcnn", PAPER_BOTTOM, 64, coarser)
    assert count == 303_670_272 + sum(second.values()) == 418_563_584
    assert teraflop == pytest.approx(2.416, abs=0.001)


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"codes": torch.full((2, 8, 12), ENTRIES)}, "codes run from 11 to 11; use 0 to 10"),
        ({"codes": torch.full((2, 8, 12), -1)}, "codes run from -1 to -1; use 0 to 10"),
        ({"codes": codes_of((8, 8))}, "codes are 8 x 8; this prior was built for grids of 8 x 12"),
        ({"labels": torch.tensor([0, 3])}, "labels run from 0 to 3; use 0 to 2"),
        ({"labels": None}, "labels are missing; this prior knows 3 classes, so give one label per grid"),
        ({"coarser": None}, "the coarser levels given are none; give codes of exactly these: top, middle"),
        (
            {"coarser": {"top": codes_of((2, 3), 2, 5)}},
            "the coarser levels given are top; give codes of exactly these: top, middle",
        ),
        (
            {"coarser": {**coarser_of(), "top": codes_of((4, 6), 2, 5)}},
            "codes of top are 4 x 6; this prior was built for grids of 2 x 3",
        ),
        (
            {"coarser": {**coarser_of(), "top": torch.full((2, 2, 3), 5)}},
            "codes of top run from 5 to 5; use 0 to 4",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused_in_one_sentence(name: str, changed: dict[str, Any], message: str):
    """The sentence holds what was found, what is allowed and the fix."""
    inputs = {"codes": codes_of((8, 12)), "coarser": coarser_of(), "labels": torch.tensor([0, 2]), **changed}
    with pytest.raises(ValueError) as caught:
        conditioned(name)(**inputs)
    assert str(caught.value) == message


def test_labels_are_refused_by_a_prior_without_classes():
    """A label that would be ignored is a mistake somewhere."""
    with pytest.raises(ValueError, match="labels were given; this prior was trained without, so leave them out"):
        plain("pixelcnn")(codes_of(GRID), None, torch.tensor([0, 1]))


def test_codes_and_labels_of_another_batch_or_type_are_refused():
    """Found by the check itself, where no shapes are checked by types."""
    prior, codes = conditioned("pixelcnn"), codes_of((8, 12))
    with pytest.raises(ValueError, match="labels are given for 1 grids of 2; give one for each"):
        prior.check(codes, coarser_of(), torch.tensor([0]))
    with pytest.raises(ValueError, match="codes of top are given for 3 grids of 2; give one for each"):
        prior.check(codes, coarser_of(3), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"codes are torch\.int32; use torch\.int64"):
        prior.check(codes.int(), coarser_of(), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"labels are torch\.int64 of shape \(2, 1\); use torch\.int64, one number"):
        prior.check(codes, coarser_of(), torch.tensor([[0], [1]]))
    with pytest.raises(ValueError, match=r"labels are torch\.float32 of shape \(2,\); use torch\.int64, one number"):
        prior.check(codes, coarser_of(), torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"entries": 0}, "the grid of the prior is 8 x 12 codes of 0 entries; use 1 or more of each"),
        ({"grid": (0, 12)}, "the grid of the prior is 0 x 12 codes of 11 entries; use 1 or more of each"),
        ({"grid": (8, -12)}, "the grid of the prior is 8 x -12 codes of 11 entries; use 1 or more of each"),
        ({"coarser": {"top": Grid(5, 4, 0)}}, "the grid of top is 4 x 0 codes of 5 entries; use 1 or more of each"),
        ({"coarser": {"top": Grid(0, 4, 6)}}, "the grid of top is 4 x 6 codes of 0 entries; use 1 or more of each"),
        ({"classes": -1}, "classes is -1; use the number of classes, or 0 for a prior without labels"),
    ],
)
def test_a_prior_of_nothing_is_refused_in_one_sentence(sizes: dict[str, Any], message: str):
    """Before anything is built."""
    wanted = {"config": config("pixelcnn"), "entries": ENTRIES, "grid": (8, 12), "coarser": {}, "classes": 0, **sizes}
    with pytest.raises(ValueError) as caught:
        build(**wanted)
    assert str(caught.value) == message


@pytest.mark.usefixtures("untyped")
def test_a_prior_there_is_not_is_refused():
    """The message lists those there are."""
    with pytest.raises(ValueError, match="the prior's name is pixelnail; use one of pixelsnail, pixelcnn"):
        plain("pixelnail")


@pytest.mark.parametrize(
    ("grid", "coarser"),
    [
        ((8, 12), {"top": Grid(5, 3, 4)}),
        ((8, 12), {"top": Grid(5, 2, 2)}),
        ((8, 12), {"top": Grid(5, 8, 12)}),
        ((9, 15), {"top": Grid(5, 3, 5)}),
        ((8, 12), {"top": Grid(5, 3, 4), "middle": Grid(5, 4, 6)}),
    ],
)
def test_grids_that_do_not_fit_into_one_another_are_refused(grid: tuple[int, int], coarser: dict[str, Grid]):
    """Before anything is built, with both sizes in the sentence."""
    with pytest.raises(ValueError, match=r"the grid is \d+ x \d+ and that of \w+ \d+ x \d+; use"):
        build(config("pixelcnn"), entries=ENTRIES, grid=grid, coarser=coarser, classes=0)


def test_an_unknown_prior_is_refused_with_the_names_there_are():
    """A misspelt name costs a sentence, not a traceback."""
    misspelt = config("pixelsnail")
    object.__setattr__(misspelt, "name", "pixelsnale")
    with pytest.raises(ValueError, match="the prior's name is pixelsnale; use one of pixelsnail, pixelcnn"):
        build(misspelt, entries=ENTRIES, grid=GRID, coarser={}, classes=0)
