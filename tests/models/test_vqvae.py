"""Promises of the hierarchical VQ-VAE: any number of levels, coarse to fine, and exact round trips."""

import math
import re
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, multiprocessing, nn
from torch.nn import functional as F

from models.config import LevelConfig, QuantizerConfig, VQVAEConfig
from models.quantizer import Share
from models.vqvae import VQVAE

STRIDES = [
    {"only": 4},
    {"top": 8, "bottom": 4},
    {"top": 8, "bottom": 2},  # strides that differ by more than one halving
    {"top": 16, "middle": 8, "bottom": 4},
    {"top": 32, "middle": 8, "bottom": 2},
]


def config(strides: dict[str, int], quantizer: QuantizerConfig | None = None, **settings: int) -> VQVAEConfig:
    """A small model: 8 channels, 16 entries of 4 numbers."""
    small = {"channels": 8, "residual_channels": 4, "residual_blocks": 1, "entries": 16, "dim": 4} | settings
    return VQVAEConfig(
        {name: LevelConfig(stride, **small) for name, stride in strides.items()}, quantizer or QuantizerConfig()
    )


def images(strides: dict[str, int], count: int = 2) -> Tensor:
    """Smooth images of two by three coarsest codes."""
    coarsest = max(strides.values())
    return F.interpolate(torch.rand(count, 3, 4, 6) * 2 - 1, size=(2 * coarsest, 3 * coarsest), mode="bilinear")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def taught(vqvae: VQVAE, batch: Tensor) -> VQVAE:
    """Place the codebooks on the latents of a batch."""
    vqvae.absorb({name: level.sums for name, level in vqvae(batch).levels.items()})
    return vqvae


@pytest.mark.parametrize("strides", STRIDES)
def test_every_level_has_its_grid_and_the_reconstruction_the_images_shape(strides: dict[str, int]):
    """One, two and three levels, of any strides, on images that are not square."""
    vqvae = VQVAE(config(strides))
    batch = images(strides)
    output = vqvae(batch)
    assert output.reconstruction.shape == batch.shape
    assert list(output.levels) == list(strides)
    for name, stride in strides.items():
        assert output.levels[name].codes.shape == (2, batch.shape[2] // stride, batch.shape[3] // stride)


@pytest.mark.parametrize("strides", STRIDES)
def test_decoded_codes_are_the_reconstruction(strides: dict[str, int]):
    """Encoding and decoding gives what the round trip gave, to the bit."""
    batch = images(strides)
    vqvae = taught(VQVAE(config(strides)), batch)
    codes = vqvae.encode(batch)
    output = vqvae(batch)
    assert all(torch.equal(codes[name], level.codes) for name, level in output.levels.items())
    assert torch.equal(vqvae.decode(codes), output.reconstruction)
    assert torch.equal(vqvae.decode(dict(reversed(codes.items()))), output.reconstruction)


@pytest.mark.parametrize("strides", STRIDES)
def test_every_coarser_level_reaches_every_finer_one_and_the_image(strides: dict[str, int]):
    """The gradient of a level's latents with respect to each coarser level's, and of the image's to all, is not 0."""
    vqvae = VQVAE(config(strides, QuantizerConfig(mode="none")))
    output = vqvae(images(strides))
    names = list(strides)
    for index, name in enumerate(names):
        for end in [output.reconstruction, *(output.levels[finer].latents for finer in names[index + 1 :])]:
            (gradient,) = torch.autograd.grad(end.square().sum(), output.levels[name].latents, retain_graph=True)
            assert gradient.abs().sum() > 0


def test_any_prefix_decodes_with_zeros_or_the_mean_entry():
    """Absent levels are filled by zeros, or by entries averaged as often as they are chosen."""
    strides = {"top": 16, "middle": 8, "bottom": 4}
    batch = images(strides)
    vqvae = taught(VQVAE(config(strides)), batch)
    codes = vqvae.encode(batch)
    full = vqvae.decode(codes)
    seen = [full]
    for given in (["top"], ["top", "middle"]):
        for fill in ("zeros", "mean"):
            image = vqvae.decode({name: codes[name] for name in given}, fill)
            assert image.shape == full.shape
            assert not any(torch.equal(image, other) for other in seen)
            seen.append(image)

    quantizer = vqvae.levels["bottom"].quantizer
    quantizer.counts.copy_(F.one_hot(torch.tensor(5), 16))
    fives = codes | {"bottom": torch.full_like(codes["bottom"], 5)}
    above = {name: codes[name] for name in ("top", "middle")}
    torch.testing.assert_close(vqvae.decode(above, "mean"), vqvae.decode(fives))


def test_the_objective_is_equation_two():
    """Means over pixels and latents, levels added, commitment weighed by beta, codebook terms by one."""
    strides = {"top": 8, "bottom": 4}
    batch = images(strides)
    for mode in ("ema", "loss"):
        vqvae = VQVAE(config(strides, QuantizerConfig(mode=mode, beta=0.5)))
        output = vqvae(batch)
        loss = vqvae.objective(output, batch)
        distance = sum(level.commitment for level in output.levels.values())
        torch.testing.assert_close(loss.reconstruction, (output.reconstruction - batch).square().mean())
        torch.testing.assert_close(loss.commitment, distance)
        weight = 1.5 if mode == "loss" else 0.5
        torch.testing.assert_close(loss.total, loss.reconstruction + weight * distance)


@pytest.mark.parametrize("mode", ["ema", "loss", "none"])
def test_every_parameter_learns(mode: str):
    """One step gives each parameter a gradient, and a few lower the loss."""
    strides = {"top": 8, "bottom": 4}
    batch = images(strides, count=4)
    vqvae = VQVAE(config(strides, QuantizerConfig(mode=mode)))
    optimizer = torch.optim.Adam(vqvae.parameters(), lr=1e-2)
    losses = []
    for step in range(60):
        output = vqvae(batch, Share(seed=0, step=step, start=0, total=4))
        loss = vqvae.objective(output, batch)
        optimizer.zero_grad()
        loss.total.backward()
        assert all(parameter.grad is not None for parameter in vqvae.parameters())
        optimizer.step()
        vqvae.absorb({name: level.sums for name, level in output.levels.items()})
        losses.append(loss.reconstruction.item())
    assert losses[-1] < 0.9 * losses[0]


def test_memory_layout_changes_rounding_alone():
    """In channels_last the same model gives the same codes, and the same reconstruction up to rounding."""
    strides = {"top": 8, "bottom": 4}
    batch = images(strides)
    vqvae = taught(VQVAE(config(strides)), batch)
    plain = vqvae(batch)
    last = vqvae.to(memory_format=torch.channels_last)(batch.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last.reconstruction, plain.reconstruction)
    assert all(torch.equal(last.levels[name].codes, plain.levels[name].codes) for name in strides)


def test_bf16_autocast_keeps_losses_and_sums_in_full_precision():
    """Convolutions may be rough; what a codebook learns from is fp32."""
    strides = {"top": 8, "bottom": 4}
    batch = images(strides)
    vqvae = VQVAE(config(strides))
    with torch.autocast("cpu", torch.bfloat16):
        output = vqvae(batch)
        loss = vqvae.objective(output, batch)
    assert output.reconstruction.dtype == torch.bfloat16
    assert {part.dtype for part in loss} == {torch.float32}
    for level in output.levels.values():
        assert {tensor.dtype for tensor in (level.latents, *level.sums)} == {torch.float32}


def compile_and_compare(rank: int) -> None:
    """Run some steps compiled and not; from the fourth on no new compilation is allowed."""
    strides = {"top": 8, "bottom": 4}
    batch = images(strides)
    vqvae = taught(VQVAE(config(strides)), batch)
    compiled = torch.compile(vqvae, fullgraph=True)
    for step in range(1, 8):
        if step == 4:
            torch.compiler.set_stance("fail_on_recompile")
        share = Share(seed=2**40, step=step, start=0, total=2)
        plain, fast = vqvae(batch, share), compiled(batch, share)
        torch.testing.assert_close(fast.reconstruction, plain.reconstruction)
        for name in strides:
            assert torch.equal(fast.levels[name].codes, plain.levels[name].codes)
            torch.testing.assert_close(fast.levels[name].sums.candidates, plain.levels[name].sums.candidates)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler: torch.compile cannot build for this CPU")
def test_a_compiled_model_does_the_same_and_is_compiled_for_all_steps():
    """No graph break, the same codes and candidates, and no new compilation for a new step."""
    multiprocessing.spawn(compile_and_compare, nprocs=1)  # a process in which shapes are not checked: dynamo cannot


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_agrees_with_the_cpu_and_compiles():
    """Codes agree but for near ties, candidates are drawn alike, and a compiled step has the same loss."""
    strides = {"top": 8, "bottom": 4}
    batch = images(strides, count=8)
    vqvae = taught(VQVAE(config(strides)), batch)
    on_cpu = vqvae(batch, Share(5, 1, 0, 8))
    vqvae = vqvae.cuda()
    on_gpu = vqvae(batch.cuda(), Share(5, 1, 0, 8))
    for name, level in on_cpu.levels.items():
        assert (level.codes == on_gpu.levels[name].codes.cpu()).float().mean() > 0.99
        torch.testing.assert_close(
            on_gpu.levels[name].sums.candidates.cpu(), level.sums.candidates, rtol=1e-3, atol=1e-4
        )
    compiled = torch.compile(vqvae)(batch.cuda(), Share(5, 1, 0, 8))
    torch.testing.assert_close(
        vqvae.objective(compiled, batch.cuda()).total, vqvae.objective(on_gpu, batch.cuda()).total, rtol=1e-3, atol=1e-4
    )
    with torch.autocast("cuda", torch.bfloat16):
        vqvae.objective(vqvae(batch.cuda()), batch.cuda()).total.backward()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 30, 64), "images are 30 x 64 pixels, but each side must be a multiple of .* stride 8; .* 32 x 64"),
        ((1, 1, 32, 32), r"images have shape \(1, 1, 32, 32\); use \(1 or more, 3, height, width\)"),
        ((0, 3, 32, 32), r"images have shape \(0, 3, 32, 32\); use \(1 or more, 3, height, width\)"),
    ],
)
def test_images_that_do_not_fit_are_refused_in_one_sentence(shape: tuple[int, ...], message: str):
    """The message holds the size found, what is allowed and the nearest size that fits."""
    vqvae = VQVAE(config({"top": 8, "bottom": 4}))
    with pytest.raises(ValueError, match=message):
        vqvae._check_images(torch.zeros(shape))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda codes: {}, r"codes hold the levels \(none\), but this model decodes top, bottom"),
        (lambda codes: {"bottom": codes["bottom"]}, "codes hold the levels bottom, but .* give the first one"),
        (lambda codes: codes | {"middle": codes["top"]}, "codes hold the levels top, bottom, middle, but"),
        (
            lambda codes: codes | {"bottom": codes["top"]},
            r"level bottom have shape \(2, 2, 3\), .* must be \(2, 4, 6\)",
        ),
        (lambda codes: codes | {"top": codes["top"] + 16}, "but the codebook has 16 entries; use codes from 0 to 15"),
        (lambda codes: {"top": codes["top"][:0]}, r"level top have shape \(0, 2, 3\); give 1 or more of each"),
        (lambda codes: {"top": codes["top"][:, :0]}, r"level top have shape \(2, 0, 3\); give 1 or more of each"),
        *(
            (lambda codes, to=to: {"top": codes["top"].to(to)}, rf"codes are {to}; use torch\.int64, such as")
            for to in (torch.uint8, torch.uint16, torch.int32, torch.float32)
        ),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_codes_that_do_not_fit_are_refused_in_one_sentence(change, message: str):
    """Unknown, missing or mismatched levels and codes out of range each say what was found and what is allowed."""
    strides = {"top": 8, "bottom": 4}
    vqvae = VQVAE(config(strides))
    with pytest.raises(ValueError, match=message):
        vqvae.decode(change(vqvae.encode(images(strides))))


@pytest.mark.usefixtures("untyped")
def test_a_filling_there_is_not_is_refused():
    """Misspelt, it would have meant zeros."""
    vqvae = VQVAE(config({"top": 8, "bottom": 4}))
    codes = vqvae.encode(images({"top": 8, "bottom": 4}))
    with pytest.raises(ValueError, match="fill is 'means'; use zeros or mean"):
        vqvae.decode({"top": codes["top"]}, fill="means")


@pytest.mark.parametrize("given", [[], ["top"], ["top", "bottom", "middle"]])
def test_sums_of_other_levels_are_refused(given: list[str]):
    """The message names the levels found and those there are, and no codebook has moved."""
    vqvae = VQVAE(config({"top": 8, "bottom": 4}))
    before = {name: value.clone() for name, value in vqvae.state_dict().items()}
    sums = {name: level.sums for name, level in vqvae(images({"top": 8})).levels.items()}
    with pytest.raises(ValueError, match=r"sums are given of the levels .*, but this model learns top, bottom; give"):
        vqvae.absorb({name: sums.get(name, sums["top"]) for name in given})
    assert all(torch.equal(before[name], value) for name, value in vqvae.state_dict().items())


@pytest.mark.parametrize("image_size", [0, -8, 4])
def test_an_image_too_small_for_one_coarsest_code_is_refused(image_size: int):
    """The message holds the smallest size there is."""
    with pytest.raises(ValueError, match=f"image_size is {image_size}; use the coarsest level's stride 8, or a"):
        config({"top": 8, "bottom": 4}).grids(image_size)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "emma"}, "mode is 'emma'; use one of ema, loss, none"),
        ({"beta": math.nan}, r"beta is nan; use 0 or more"),
        ({"epsilon": math.nan}, "epsilon is nan; use a small positive number"),
        ({"decay": math.nan}, "decay is nan; use 0"),
    ],
)
def test_a_way_of_learning_there_is_not_is_refused(settings: dict[str, Any], message: str):
    """Misspelt, `ema` would have meant `loss`."""
    with pytest.raises(ValueError, match=message):
        QuantizerConfig(**settings)


def test_level_dropout_leaves_whole_images_alone_and_others_a_coarse_prefix():
    """Each image is decoded from all levels or from a prefix filled by zeros; without training, always from all."""
    torch.manual_seed(0)
    levels = {"top": LevelConfig(8, 8, 4, 1, 16, 4), "bottom": LevelConfig(4, 8, 4, 1, 16, 4)}
    model = VQVAE(VQVAEConfig(levels, level_dropout=0.5))
    images = torch.randn(32, 3, 16, 16)
    with torch.no_grad():
        dropped, whole = model.train()(images).reconstruction, model.eval()(images).reconstruction
        codes = model.encode(images)
        prefix = model.decode({"top": codes["top"]})
    of_whole = (dropped - whole).flatten(1).abs().amax(1) < 1e-6
    of_prefix = (dropped - prefix).flatten(1).abs().amax(1) < 1e-6
    assert (of_whole | of_prefix).all() and 4 < of_prefix.sum() < 28


@pytest.mark.parametrize("name", ["a.b", "a/b", "Top", "../top", "2nd", "top level", ""])
def test_a_level_is_named_so_that_its_name_serves_everywhere(name: str):
    """A level's name is also a folder, a column beside others, and a part of the names of weights."""
    with pytest.raises(ValueError, match=f"a level is named '{name}'; use lower-case letters"):
        config({name: 4})


@pytest.mark.parametrize("name", ["label", "key", "copy", "total", "pixels"])
def test_a_level_is_not_named_as_what_stands_beside_levels(name: str):
    """Columns of codes and rows of metrics bear the levels' names, and some of their own."""
    with pytest.raises(ValueError, match=f"a level is named '{name}', .*; use another name"):
        config({name: 4})


@pytest.mark.parametrize("name", [name for name in dir(nn.ModuleDict()) if re.fullmatch("[a-z][a-z0-9_]*", name)])
def test_a_level_is_not_named_as_something_of_torch(name: str):
    """Torch would refuse it later, without saying which setting is meant."""
    with pytest.raises(ValueError, match=f"a level is named '{name}', .*; use another name"):
        config({name: 8, "bottom": 4})


def test_a_codebook_of_one_entry_is_refused():
    """Its codes would say nothing, and what is measured per bit would be divided by none."""
    with pytest.raises(ValueError, match=r"entries is 1; .* 2 or more"):
        config({"top": 4}, entries=1)
