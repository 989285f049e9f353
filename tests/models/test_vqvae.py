"""Hierarchical VQ-VAE: any number of levels, exact decoding of codes, and refused inputs."""

import dataclasses
import math
import re
import shutil
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, multiprocessing, nn

from models.config import LevelConfig, QuantizerConfig, VQVAEConfig
from models.quantizer import BatchSlice
from models.vqvae import VQVAE

STRIDES = [
    {"only": 4},
    {"top": 8, "bottom": 4},
    {"top": 8, "bottom": 2},  # strides that differ by more than one halving
    {"top": 16, "middle": 8, "bottom": 4},
    {"top": 32, "middle": 8, "bottom": 2},
]


def config(strides: dict[str, int], quantizer: QuantizerConfig | None = None, **settings: int) -> VQVAEConfig:
    """Return a small model: 8 channels, 16 entries of 4 numbers."""
    small = {"channels": 8, "residual_channels": 4, "residual_blocks": 1, "entries": 16, "dim": 4} | settings
    return VQVAEConfig(
        {name: LevelConfig(stride, **small) for name, stride in strides.items()}, quantizer or QuantizerConfig()
    )


def images(strides: dict[str, int], count: int = 2) -> Tensor:
    """Return smooth images of two by three coarsest codes."""
    coarsest = max(strides.values())
    return F.interpolate(torch.rand(count, 3, 4, 6) * 2 - 1, size=(2 * coarsest, 3 * coarsest), mode="bilinear")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def absorbed(vqvae: VQVAE, batch: Tensor) -> VQVAE:
    """Let a model absorb a batch, which places its entries on latents."""
    vqvae.absorb({name: level.sums for name, level in vqvae(batch).levels.items()})
    return vqvae


@pytest.mark.parametrize("strides", STRIDES)
def test_shapes_of_codes_and_reconstruction(strides: dict[str, int]):
    """They follow from the strides of one, two or three levels, on images that are not square."""
    vqvae = VQVAE(config(strides))
    batch = images(strides)
    output = vqvae(batch)
    assert output.reconstruction.shape == batch.shape
    assert list(output.levels) == list(strides)
    for name, stride in strides.items():
        assert output.levels[name].codes.shape == (2, batch.shape[2] // stride, batch.shape[3] // stride)


@pytest.mark.parametrize("strides", STRIDES)
def test_decoded_codes_equal_the_reconstruction(strides: dict[str, int]):
    """`decode(encode(images))` is exactly the reconstruction of `forward`."""
    batch = images(strides)
    vqvae = absorbed(VQVAE(config(strides)), batch)
    codes = vqvae.encode(batch)
    output = vqvae(batch)
    assert all(torch.equal(codes[name], level.codes) for name, level in output.levels.items())
    assert torch.equal(vqvae.decode(codes), output.reconstruction)
    assert torch.equal(vqvae.decode(dict(reversed(codes.items()))), output.reconstruction)


@pytest.mark.parametrize("strides", STRIDES)
def test_finer_levels_and_image_depend_on_every_coarser_level(strides: dict[str, int]):
    """The gradients of finer latents and of the reconstruction with respect to each level's latents are not 0."""
    vqvae = VQVAE(config(strides, QuantizerConfig(mode="none")))
    output = vqvae(images(strides))
    names = list(strides)
    for index, name in enumerate(names):
        for target in [output.reconstruction, *(output.levels[finer].latents for finer in names[index + 1 :])]:
            (gradient,) = torch.autograd.grad(target.square().sum(), output.levels[name].latents, retain_graph=True)
            assert gradient.abs().sum() > 0


def test_prefix_of_levels_decodes_with_zeros_or_the_mean_entry():
    """Missing levels are filled with zeros, or with the mean of entries weighted by their frequency."""
    strides = {"top": 16, "middle": 8, "bottom": 4}
    batch = images(strides)
    vqvae = absorbed(VQVAE(config(strides)), batch)
    codes = vqvae.encode(batch)
    full = vqvae.decode(codes)
    decoded = [full]
    for prefix in (["top"], ["top", "middle"]):
        for fill in ("zeros", "mean"):
            image = vqvae.decode({name: codes[name] for name in prefix}, fill)
            assert image.shape == full.shape
            assert not any(torch.equal(image, other) for other in decoded)
            decoded.append(image)

    quantizer = vqvae.levels["level_bottom"].quantizer
    quantizer.counts.copy_(F.one_hot(torch.tensor(5), 16))
    fives = codes | {"bottom": torch.full_like(codes["bottom"], 5)}
    coarser = {name: codes[name] for name in ("top", "middle")}
    torch.testing.assert_close(vqvae.decode(coarser, "mean"), vqvae.decode(fives))


def test_objective_is_equation_two():
    """It is the sum of means over pixels and latents; beta weights the commitment, 1 the codebook terms."""
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
def test_every_parameter_has_a_gradient_and_the_loss_falls(mode: str):
    """This holds in every mode of the quantizer."""
    strides = {"top": 8, "bottom": 4}
    batch = images(strides, count=4)
    vqvae = VQVAE(config(strides, QuantizerConfig(mode=mode)))
    optimizer = torch.optim.Adam(vqvae.parameters(), lr=1e-2)
    losses = []
    for step in range(60):
        output = vqvae(batch, BatchSlice(seed=0, step=step, start=0, total=4))
        loss = vqvae.objective(output, batch)
        optimizer.zero_grad()
        loss.total.backward()
        assert all(parameter.grad is not None for parameter in vqvae.parameters())
        optimizer.step()
        vqvae.absorb({name: level.sums for name, level in output.levels.items()})
        losses.append(loss.reconstruction.item())
    assert losses[-1] < 0.9 * losses[0]


def test_memory_layout_changes_only_rounding():
    """In channels_last the codes are equal, and the reconstruction is equal up to rounding."""
    strides = {"top": 8, "bottom": 4}
    batch = images(strides)
    vqvae = absorbed(VQVAE(config(strides)), batch)
    plain = vqvae(batch)
    last = vqvae.to(memory_format=torch.channels_last)(batch.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last.reconstruction, plain.reconstruction)
    assert all(torch.equal(last.levels[name].codes, plain.levels[name].codes) for name in strides)


def test_losses_and_sums_are_float32_under_bf16_autocast():
    """Only the convolutions run in bfloat16."""
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
    """Compare steps of the compiled model with the model. From the fourth step on, recompilation is an error."""
    strides = {"top": 8, "bottom": 4}
    batch = images(strides)
    vqvae = absorbed(VQVAE(config(strides)), batch)
    compiled = torch.compile(vqvae, fullgraph=True)
    for step in range(1, 8):
        if step == 4:
            torch.compiler.set_stance("fail_on_recompile")
        batch_slice = BatchSlice(seed=2**40, step=step, start=0, total=2)
        plain, fast = vqvae(batch, batch_slice), compiled(batch, batch_slice)
        torch.testing.assert_close(fast.reconstruction, plain.reconstruction)
        for name in strides:
            assert torch.equal(fast.levels[name].codes, plain.levels[name].codes)
            torch.testing.assert_close(fast.levels[name].sums.candidates, plain.levels[name].sums.candidates)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler: torch.compile cannot build for this CPU")
def test_compiled_model_is_equal_and_does_not_recompile():
    """There is no graph break, codes and candidates are equal, and a new step needs no new compilation."""
    multiprocessing.spawn(
        compile_and_compare, nprocs=1
    )  # in another process, without the shape checks: dynamo cannot trace them


@pytest.mark.gpu
def test_gpu_agrees_with_cpu_and_compiles():
    """Codes agree except near ties, candidates are the same, and a compiled step has the same loss."""
    strides = {"top": 8, "bottom": 4}
    batch = images(strides, count=8)
    vqvae = absorbed(VQVAE(config(strides)), batch)
    on_cpu = vqvae(batch, BatchSlice(5, 1, 0, 8))
    vqvae = vqvae.cuda()
    on_gpu = vqvae(batch.cuda(), BatchSlice(5, 1, 0, 8))
    for name, level in on_cpu.levels.items():
        assert (level.codes == on_gpu.levels[name].codes.cpu()).float().mean() > 0.99
        torch.testing.assert_close(
            on_gpu.levels[name].sums.candidates.cpu(), level.sums.candidates, rtol=1e-3, atol=1e-4
        )
    compiled = torch.compile(vqvae)(batch.cuda(), BatchSlice(5, 1, 0, 8))
    torch.testing.assert_close(
        vqvae.objective(compiled, batch.cuda()).total, vqvae.objective(on_gpu, batch.cuda()).total, rtol=1e-3, atol=1e-4
    )
    with torch.autocast("cuda", torch.bfloat16):
        vqvae.objective(vqvae(batch.cuda()), batch.cuda()).total.backward()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 30, 64), "images must be multiples of 8 pixels, .*, got 30 x 64; crop or pad to 32 x 64"),
        ((1, 1, 32, 32), r"images must be of shape \(1 or more, 3, height, width\), got \(1, 1, 32, 32\)"),
        ((0, 3, 32, 32), r"images must be of shape \(1 or more, 3, height, width\), got \(0, 3, 32, 32\)"),
    ],
)
def test_image_of_an_invalid_shape_is_refused(shape: tuple[int, ...], message: str):
    """The error has the valid shape, the shape of the images, and the next valid size."""
    vqvae = VQVAE(config({"top": 8, "bottom": 4}))
    with pytest.raises(ValueError, match=message):
        vqvae._check_images(torch.zeros(shape))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda codes: {}, r"codes must be of the first level or more .*, of top, bottom, got none"),
        (lambda codes: {"bottom": codes["bottom"]}, "codes must be of the first level or more .*, got bottom"),
        (
            lambda codes: codes | {"middle": codes["top"]},
            "codes must be of the first level or more .*, got top, bottom, middle",
        ),
        (
            lambda codes: codes | {"bottom": codes["top"]},
            r"codes of level bottom must be of shape \(2, 4, 6\) .*, got \(2, 2, 3\)",
        ),
        (lambda codes: codes | {"top": codes["top"] + 16}, "codes must be 0 to 15, as the codebook has 16 entries"),
        (
            lambda codes: {"top": codes["top"][:0]},
            r"codes of level top must be of shape \(images, height, width\), 1 or more each, got \(0, 2, 3\)",
        ),
        (
            lambda codes: {"top": codes["top"][:, :0]},
            r"codes of level top must be of shape .*, 1 or more each, got \(2, 0, 3\)",
        ),
        *(
            (
                lambda codes, dtype=dtype: {"top": codes["top"].to(dtype)},
                rf"codes must be torch\.int64, got {dtype}; use",
            )
            for dtype in (torch.uint8, torch.uint16, torch.int32, torch.float32)
        ),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_invalid_codes_are_refused(change, message: str):
    """The error for missing or unknown levels, and for wrong shapes, codes or dtypes, has the rule and the value."""
    strides = {"top": 8, "bottom": 4}
    vqvae = VQVAE(config(strides))
    with pytest.raises(ValueError, match=message):
        vqvae.decode(change(vqvae.encode(images(strides))))


@pytest.mark.usefixtures("untyped")
def test_unknown_fill_is_refused():
    """A misspelt name is not taken as zeros."""
    vqvae = VQVAE(config({"top": 8, "bottom": 4}))
    codes = vqvae.encode(images({"top": 8, "bottom": 4}))
    with pytest.raises(ValueError, match="fill must be zeros or mean, got 'means'"):
        vqvae.decode({"top": codes["top"]}, fill="means")


@pytest.mark.parametrize("levels", [[], ["top"], ["top", "bottom", "middle"]])
def test_sums_of_other_levels_are_refused(levels: list[str]):
    """The error has the valid levels, and no codebook changes."""
    vqvae = VQVAE(config({"top": 8, "bottom": 4}))
    before = {name: value.clone() for name, value in vqvae.state_dict().items()}
    sums = {name: level.sums for name, level in vqvae(images({"top": 8})).levels.items()}
    with pytest.raises(ValueError, match=r"sums must be of the levels top, bottom, got .*; use"):
        vqvae.absorb({name: sums.get(name, sums["top"]) for name in levels})
    assert all(torch.equal(before[name], value) for name, value in vqvae.state_dict().items())


@pytest.mark.parametrize("image_size", [0, -8, 4])
def test_image_smaller_than_the_coarsest_stride_is_refused(image_size: int):
    """The error has the smallest valid size."""
    with pytest.raises(ValueError, match=f"image_size must be a multiple of 8, .*, got {image_size}; use 8$"):
        config({"top": 8, "bottom": 4}).grids(image_size)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "emma"}, "mode must be one of ema, loss, none, got 'emma'"),
        ({"beta": math.nan}, "beta must be 0 or more, got nan"),
        ({"epsilon": math.nan}, "epsilon must be a small number above 0, such as 1e-5, got nan"),
        ({"decay": math.nan}, "decay must be 0 or more and below 1, got nan"),
    ],
)
def test_invalid_learning_rule_is_refused(settings: dict[str, Any], message: str):
    """A misspelt mode is not taken as another one, and no number may be NaN."""
    with pytest.raises(ValueError, match=message):
        QuantizerConfig(**settings)


def test_level_dropout_decodes_some_images_from_a_prefix():
    """In training, an image is decoded from all levels or from a prefix filled with zeros; otherwise from all."""
    torch.manual_seed(0)
    levels = {"top": LevelConfig(8, 8, 4, 1, 16, 4), "bottom": LevelConfig(4, 8, 4, 1, 16, 4)}
    model = VQVAE(VQVAEConfig(levels, level_dropout=0.5))
    images = torch.randn(32, 3, 16, 16)
    with torch.no_grad():
        dropped, full = model.train()(images).reconstruction, model.eval()(images).reconstruction
        codes = model.encode(images)
        prefix = model.decode({"top": codes["top"]})
    is_full = (dropped - full).flatten(1).abs().amax(1) < 1e-6
    is_prefix = (dropped - prefix).flatten(1).abs().amax(1) < 1e-6
    assert (is_full | is_prefix).all() and 4 < is_prefix.sum() < 28


@pytest.mark.parametrize("name", ["a.b", "a/b", "Top", "../top", "2nd", "top level", ""])
def test_level_name_that_is_no_identifier_is_refused(name: str):
    """The name is used as a folder, a column, and a part of the names of weights."""
    with pytest.raises(ValueError, match=f"levels must be named in lower-case letters, .*, got '{name}'"):
        config({name: 4})


@pytest.mark.parametrize("name", [name for name in dir(nn.ModuleDict()) if re.fullmatch("[a-z][a-z0-9_]*", name)])
def test_level_may_have_the_name_of_a_torch_attribute(name: str):
    """A level called "forward" or "update" encodes and decodes, and is restored from its state dict."""
    strides = {name: 8, "bottom": 4}
    batch = images(strides)
    vqvae = absorbed(VQVAE(config(strides)), batch)
    restored = VQVAE(config(strides))
    restored.load_state_dict(vqvae.state_dict())
    codes = restored.encode(batch)
    assert list(codes) == [name, "bottom"]
    assert torch.equal(restored.decode(codes), vqvae(batch).reconstruction)


def test_prefixes_decode_as_if_one_by_one():
    """`decode_prefixes` gives the images of the coarsest level, of the two coarsest, and so on, for either fill."""
    strides = {"top": 16, "middle": 8, "bottom": 4}
    batch = images(strides)
    vqvae = absorbed(VQVAE(config(strides)), batch)
    codes = vqvae.encode(batch)
    for fill in ("zeros", "mean"):
        decoded = vqvae.decode_prefixes(dict(reversed(codes.items())), fill)
        expected = [vqvae.decode({name: codes[name] for name in list(strides)[:count]}, fill) for count in (1, 2, 3)]
        assert len(decoded) == 3 and all(map(torch.equal, decoded, expected))


def test_codebook_of_one_entry_is_refused():
    """Its codes have no information, and metrics per bit would divide by 0."""
    with pytest.raises(ValueError, match="entries must be 2 to 65536, got 1"):
        config({"top": 4}, entries=1)


def test_filters_of_three_pixels_halve_the_grid_alike():
    """The shapes are those of filters of four pixels, with fewer parameters."""
    strides = {"top": 8, "bottom": 4}
    batch = images(strides)
    four, three = (VQVAE(config(strides, down_kernel_size=size)) for size in (4, 3))
    assert [level.codes.shape for level in three(batch).levels.values()] == [
        level.codes.shape for level in four(batch).levels.values()
    ]
    assert sum(p.numel() for p in three.parameters()) < sum(p.numel() for p in four.parameters())


def test_reconstruction_error_is_divided_by_the_variance():
    """The metric is not: it stays the MSE. At variance 1 the loss is that without the setting."""
    strides = {"only": 4}
    vqvae = VQVAE(config(strides))
    batch = images(strides)
    output = vqvae(batch)
    plain = vqvae.objective(output, batch)
    vqvae.config = dataclasses.replace(vqvae.config, image_variance=0.25)
    scaled = vqvae.objective(output, batch)
    assert scaled.reconstruction == plain.reconstruction
    torch.testing.assert_close(scaled.total - plain.total, 3 * plain.reconstruction)


def test_latents_of_a_forward_pass_decode_to_its_reconstruction():
    """Also without quantization, where there are no codes to decode."""
    strides = {"top": 8, "bottom": 4}
    for mode in ("ema", "none"):
        vqvae = VQVAE(config(strides, QuantizerConfig(mode=mode))).eval()
        output = vqvae(images(strides))
        latents = {name: level.latents for name, level in output.levels.items()}
        assert torch.equal(vqvae.decode_latents(latents), output.reconstruction)
