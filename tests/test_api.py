"""Python API: equal to the stages and commands on the same artifacts, for images and codes of every form."""

import math
import re
import shutil
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vqvae2
from models.config import QuantizerConfig, VQVAEConfig
from models.priors import Grid, nll
from models.vqvae import VQVAE
from pipeline.commands import sample as sample_command
from stages.config import LevelRule, SampleConfig
from stages.formats import model_file
from stages.formats.codes import open_codes
from stages.formats.samples import open_samples
from stages.formats.shards import open_shards
from stages.inference.inputs import check_rows
from stages.inference.sampling_options import apply_options
from tests.mini_pipeline import MiniPipeline

ROOT = Path(__file__).parents[1]
ENTRIES = {"top": 16, "bottom": 8}  # of a codebook, by level


@pytest.fixture(scope="module")
def folder(finished_pipeline: MiniPipeline) -> Path:
    return finished_pipeline.folder / "artifacts"


@pytest.fixture(scope="module")
def model(folder: Path) -> vqvae2.Model:
    return vqvae2.load(folder, device="cpu")


@pytest.fixture(scope="module")
def pixels(folder: Path) -> np.ndarray:
    """The validation images, (4, 16, 16, 3)."""
    images = open_shards(folder / "shards").split("validation")
    return np.stack([images.read(position) for position in range(len(images))])


def equal(first, second) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[level], second[level]) for level in first)


# Import


def test_import_loads_no_slow_library():
    """Torch and the other libraries are imported by the first call."""
    code = "import sys, vqvae2; print(*(sys.modules.keys() & {'torch', 'numpy', 'PIL', 'pyarrow', 'ray', 'mlflow'}))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.stdout, result.stderr) == ("\n", "")


def test_use_of_a_model_imports_neither_ray_nor_mlflow(folder: Path):
    """The libraries that train a model are not needed to use it."""
    use = f"vqvae2.load({str(folder)!r}).sample(1)"
    code = f"import sys, vqvae2; {use}; print(*(sys.modules.keys() & {{'ray', 'mlflow'}}))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stdout == "\n", result.stderr


def test_public_names_exist():
    """Classes are imported on first use; any other name is an AttributeError."""
    assert all(hasattr(vqvae2, name) for name in vqvae2.__all__)
    assert not hasattr(vqvae2, "train")


# Loading


def test_model_is_loaded_from_a_project_its_artifacts_or_a_copy(folder: Path, model, tmp_path: Path):
    """All give the same codes."""
    for name in ("vqvae", "priors", "samples"):
        shutil.copytree(folder / name, tmp_path / "copy" / name)
    expected = model.sample_codes(3, seed=5)
    for other in (folder.parent, str(folder), tmp_path / "copy"):
        assert equal(vqvae2.load(other, device="cpu").sample_codes(3, seed=5), expected)


def test_model_without_priors_encodes_and_decodes_only(folder: Path, model, pixels, tmp_path: Path):
    """The error of any other method has the folder that is missing."""
    shutil.copytree(folder / "vqvae", tmp_path / "vqvae")
    half = vqvae2.load(tmp_path)
    assert equal(half.encode(pixels), model.encode(pixels)) and len(half.decode(half.encode(pixels))) == 4
    for call in (
        half.sample,
        lambda: half.score(pixels),
        lambda: half.restore(pixels),
        lambda: half.complete(pixels[0]),
    ):
        with pytest.raises(vqvae2.UserError, match=r"has no priors[\s\S]*priors[\s\S]*vqvae2 run"):
            call()


@pytest.mark.parametrize("name", ["empty", "absent"])
def test_folder_without_a_model_is_refused(tmp_path: Path, name: str):
    """The error states what the folder must hold."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        vqvae2.UserError, match=rf"holds vqvae/ and priors/[\s\S]*in: .*{name}[\s\S]*fix: Name a project"
    ):
        vqvae2.load(tmp_path / name)


def test_vqvae_that_does_not_quantize_is_refused(folder: Path, tmp_path: Path, finished_pipeline):
    """It has no codes."""
    _, artifact = model_file.load_vqvae(folder / "vqvae")
    config = VQVAEConfig(finished_pipeline.network.levels, QuantizerConfig(mode="none"))
    meta = {**artifact.meta, "network": model_file.network_meta(config)}
    model_file.write(tmp_path / "vqvae", "vqvae", VQVAE(config).state_dict(), meta, history=[], images={})
    with pytest.raises(vqvae2.UserError, match="does not quantize"):
        vqvae2.load(tmp_path)


# Samples


def test_samples_equal_those_of_the_stage(folder: Path, model):
    """Codes and images, with the stage's seed, labels and sampling rule."""
    samples = open_samples(folder / "samples")
    assert equal(model.sample_codes(10, seed=0), samples.codes.codes)
    assert np.array_equal(model.sample(10, seed=0, format="numpy"), samples.images(0, 10))


def test_samples_equal_those_of_the_command(folder: Path, model, tmp_path: Path):
    """`vqvae2 sample` draws the same images of the same classes."""
    config = SampleConfig(count=3, classes=("light",), temperature=0.7, top_k=3)
    sample_command.draw(tmp_path / "out", config, seed=4, sheet=tmp_path / "sheet.png", model=folder)
    drawn = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "out").glob("*.png"))]
    images = model.sample(3, classes=["light"], seed=4, temperature=0.7, top_k=3, format="numpy")
    assert np.array_equal(images, np.stack(drawn))


def test_formats_hold_the_same_images(model):
    """PIL images, a uint8 array, and a tensor of floats in [-1, 1] with channels second."""
    array, tensor = (model.sample(2, format=name) for name in ("numpy", "torch"))
    assert np.array_equal(np.stack([np.asarray(image) for image in model.sample(2)]), array)
    assert tensor.shape == (2, 3, 16, 16) and tensor.abs().max() <= 1
    assert equal(model.encode(tensor), model.encode(array))
    with pytest.raises(ValueError, match="format must be pil, numpy or torch, got 'jpeg'"):
        model.sample(1, format="jpeg")


def test_options_of_samples_out_of_range_are_refused(model):
    """The errors have the classes, the codebook and the range."""
    with pytest.raises(vqvae2.UserError, match=r"'gray' is not a valid class[\s\S]*in: classes\n[\s\S]*dark, light"):
        model.sample(1, classes=["gray"])
    with pytest.raises(ValueError, match=r"classes must be a list of names, got 'dark'; use \['dark'\]"):
        model.sample(1, classes="dark")
    with pytest.raises(ValueError, match="count must be 1 or more, got 0"):
        model.sample(0)
    with pytest.raises(ValueError, match=r"top_k must be at most 16, .* got 17"):
        model.sample(1, top_k=17)
    with pytest.raises(ValueError, match="temperature must be a number above 0, got 0"):
        model.sample(1, temperature=0)


@pytest.mark.parametrize("method", ["sample", "restore", "complete"])
def test_every_drawing_method_takes_the_same_options(model, pixels, method: str):
    """As the same method of codes does: a greedy draw is equal for all seeds, and a wrong option is refused."""
    inputs = {"sample": (1,), "restore": (pixels[:1],), "complete": (pixels[0],)}[method]
    images = [getattr(model, method)(*inputs, seed=seed, top_k=1, top_p=None, format="numpy") for seed in (0, 1)]
    assert np.array_equal(*images)
    with pytest.raises(TypeError, match=r"sampling options must be any of temperature, .*, got temprature"):
        getattr(model, method)(*inputs, temprature=1.0)
    with pytest.raises(ValueError, match=r"top_k must be at most 16, .* got 17"):
        getattr(model, method)(*inputs, top_k=17)


# Codes


def test_guidance_and_rules_of_levels_change_the_samples(model):
    """A rule of the finest level keeps the coarser codes; guidance of 1 keeps all."""
    plain = model.sample_codes(4, seed=1)
    assert equal(model.sample_codes(4, seed=1, guidance=1.0), plain)
    likeliest = model.sample_codes(4, seed=1, level_rules={"bottom": {"top_k": 1}})
    assert equal({"top": likeliest["top"]}, {"top": plain["top"]}) and not equal(likeliest, plain)
    assert not equal(model.sample_codes(4, seed=1, guidance=1e4), plain)  # 12 steps of training teach little of labels


def test_options_change_stored_rules_of_levels_as_the_command_line_does():
    """An option of all levels overrides them, rules of levels are added to them, and an empty mapping removes them."""
    stored = SampleConfig(level_rules={"bottom": LevelRule(temperature=0.5, top_k=3)})
    options = {"temperature": 0.9, "top_p": None}
    config = apply_options(options, stored, entries=ENTRIES)
    assert config == sample_command.choose_config(stored, stored.count, (), **options)
    assert config.rule("bottom") == {"temperature": 0.9, "top_k": 3, "top_p": 1.0, "guidance": 1.0}
    added = apply_options({"level_rules": {"bottom": {"top_k": 5}}}, stored, entries=ENTRIES)
    assert added == sample_command.choose_config(stored, stored.count, (), ["bottom.top_k=5"])
    assert added.level_rules == {"bottom": LevelRule(temperature=0.5, top_k=5)}
    assert apply_options({}, stored, entries=ENTRIES) == stored
    assert apply_options({"level_rules": {}}, stored, entries=ENTRIES) == SampleConfig()


def test_top_k_of_a_level_above_its_codebook_is_refused():
    """It is compared with the codebook of its level, which may be smaller than the largest one."""
    options = {"level_rules": {"bottom": {"top_k": 9}}}
    with pytest.raises(ValueError, match="top_k of bottom must be at most 8, the entries of its codebook, got 9"):
        apply_options(options, SampleConfig(), entries=ENTRIES)
    assert apply_options({"top_k": 16}, SampleConfig(), entries=ENTRIES).top_k == 16


def test_guidance_of_a_restoration_is_refused(model, pixels):
    """It compares codes by their likelihood, which has no guidance."""
    with pytest.raises(ValueError, match="guidance must be 1 for restoration"):
        model.restore_codes(model.encode(pixels), guidance=2.0)


def test_images_of_every_form_have_the_same_codes(model, pixels, tmp_path: Path):
    """Paths, PIL images, arrays, and one image alone."""
    paths = [tmp_path / f"{number}.png" for number in range(len(pixels))]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image).save(path)
    codes = model.encode(pixels)
    assert {level: grids.shape for level, grids in codes.items()} == {"top": (4, 2, 2), "bottom": (4, 4, 4)}
    for images in (paths, list(map(str, paths)), [Image.open(path) for path in paths], list(pixels)):
        assert equal(model.encode(images), codes)
    for image in (paths[0], Image.open(paths[0]), pixels[0]):
        assert equal(model.encode(image), {level: grids[:1] for level, grids in codes.items()})


def test_codes_equal_those_of_the_stage(folder: Path, model, pixels):
    """The rows of the validation images."""
    assert equal(model.encode(pixels), open_codes(folder / "codes").split("validation").codes)


def test_other_sizes_and_modes_are_converted_as_files_are(model, tmp_path: Path):
    """A wide image with transparency gives the codes of its file."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 50, 4), np.uint8), "RGBA")
    image.save(tmp_path / "wide.png")
    assert equal(model.encode(image), model.encode(tmp_path / "wide.png"))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "images must be 1 or more, got none"),
        (np.zeros((1, 16, 16, 3), np.float32), r"image 0 must be uint8 of shape \(H, W, 3\), got float32"),
        ([np.zeros((16, 16), np.uint8)], r"image 0 must be uint8 .* got uint8 of shape \(16, 16\)"),
        ([1], "image 0 must be a path, a PIL image or a uint8 array, got int"),
        ([Image.new("F", (16, 16))], "image 0 must be a valid image: float pixels"),
        (torch.zeros(16, 16, 3), r"must be floats in \[-1, 1\] of shape \(N, 3, H, W\), got torch.float32 of shape"),
        (["absent.png"], r"absent.png does not exist\."),
    ],
)
def test_anything_but_images_is_refused(model, images, message: str):
    """The error has the image and what is wrong with it."""
    with pytest.raises((ValueError, vqvae2.UserError), match=message):
        model.encode(images)


def test_decoded_codes_are_the_reconstructions(model, pixels):
    """Of all levels, or of the coarsest ones."""
    codes, batch = model.encode(pixels), torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.inference_mode():
        top, both = model.vqvae.decode_prefixes(model.vqvae.encode(batch))
    for levels, expected in ((["top"], top), (None, both), (["top", "bottom"], both)):
        decoded = model.decode(codes, levels=levels, format="torch")
        torch.testing.assert_close(decoded, expected.clamp(-1, 1), atol=1 / 255, rtol=0)
    assert np.array_equal(
        model.decode({"top": codes["top"]}, format="numpy"), model.decode(codes, levels=["top"], format="numpy")
    )


@pytest.mark.parametrize(
    ("change", "levels", "message"),
    [
        ({}, ["bottom"], "levels must be the first ones of top, bottom, got bottom"),
        ({}, "top", r"levels must be a list of names, got 'top'; use \['top'\]"),
        ({}, [], "levels must be the first ones of top, bottom, got none"),
        ({"top": np.full((4, 2, 2), 16)}, None, "codes of top must be 0 to 15, got 16 to 16"),
        ({"top": np.zeros((4, 2, 2))}, None, "codes of top must be integers of shape .* got float64"),
        ({"top": np.zeros((4, 3, 2), int)}, None, r"\(1 or more, 2, 2\), got int64 of shape \(4, 3, 2\)"),
        ({"top": np.zeros((3, 2, 2), int)}, None, "same number of images at every level, got {'top': 3, 'bottom': 4}"),
    ],
)
def test_codes_that_do_not_fit_the_model_are_refused(model, pixels, change, levels, message: str):
    """The error has the level and the shape or range that it must have."""
    with pytest.raises(ValueError, match=message):
        model.decode(model.encode(pixels) | change, levels=levels)


# Scores


def test_scores_equal_the_losses_of_the_priors(model, pixels):
    """The sum of the maps of a level is the negative log-likelihood that the prior is trained on."""
    codes, labels = model.encode(pixels), [0, 1, 1, 0]
    scores = model.score(pixels, labels=["dark", "light", "light", "dark"])
    grids = {level: torch.from_numpy(grid) for level, grid in codes.items()}
    total = 0.0
    for level, prior in model.priors.items():
        coarser = {name: grids[name] for name in prior.coarser}
        with torch.inference_mode():
            expected = nll(prior(grids[level], coarser, torch.tensor(labels)), grids[level]).numpy()
        np.testing.assert_allclose(scores.maps[level].sum((1, 2)), expected, rtol=1e-5)
        np.testing.assert_allclose(scores.per_level[level] * grids[level][0].numel(), expected, rtol=1e-5)
        total = total + expected
    np.testing.assert_allclose(scores.per_image, total, rtol=1e-5)
    assert scores.maps["bottom"].shape == (4, 4, 4) and scores.labels.tolist() == labels and len(scores) == 4


def test_heat_maps_sum_to_the_score_of_the_image(model, pixels):
    """Each code's nats are spread over its pixels."""
    scores = model.score(pixels, labels=[0] * 4)
    heat_maps = scores.heat_maps()
    assert heat_maps.shape == (4, 16, 16)
    np.testing.assert_allclose(heat_maps.sum((1, 2)), scores.per_image, rtol=1e-6)
    top = scores.maps["top"][0, 0, 1] / 64 + scores.maps["bottom"][0, 0, 2] / 16
    np.testing.assert_allclose(heat_maps[0, 0, 8], top, rtol=1e-6)


def test_label_of_an_image_defaults_to_the_most_probable_class(model, pixels):
    """By the likelihood of the codes of all levels."""
    scores = model.score(pixels)  # the two classes are equally frequent
    nats = [model.score(pixels, labels=[label] * 4).per_image for label in (0, 1)]
    assert scores.labels.tolist() == np.argmin(nats, axis=0).tolist()
    assert np.array_equal(scores.per_image, model.score(pixels, labels=scores.labels).per_image)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["dark"], "labels must be one per image, of which there are 4, got 1"),
        (["gray"] * 4, "labels must be any of dark, light, or an index below 2, got 'gray'"),
        ([2] * 4, "or an index below 2, got 2"),
        ("dark", "labels must be a list of names, got 'dark'"),
    ],
)
def test_labels_that_do_not_fit_are_refused(model, pixels, labels, message: str):
    """The error has the classes of the model."""
    with pytest.raises(ValueError, match=message):
        model.score(pixels, labels=labels)


# Restoration and completion


def test_restoration_with_an_infinite_threshold_is_the_reconstruction(model, pixels):
    """No code changes."""
    codes = model.encode(pixels)
    assert equal(model.restore_codes(codes, threshold=math.inf), codes)
    restored = model.restore(pixels, threshold=math.inf, format="numpy")
    assert np.array_equal(restored, model.decode(codes, format="numpy"))


def test_restoration_keeps_likely_codes_and_is_deterministic(model, pixels):
    """Before the first code that is drawn again, all stay; equal seeds give equal codes, others do not."""
    codes, labels = model.encode(pixels), [0] * 4
    nats = model.score_codes(codes, labels=labels).maps["top"].reshape(4, -1)
    threshold = float(np.median(nats))
    restored = [model.restore_codes(codes, threshold=threshold, labels=labels, seed=seed) for seed in (0, 0, 1)]
    for index, position in enumerate((nats > threshold).argmax(1)):
        assert np.array_equal(restored[0]["top"][index].ravel()[:position], codes["top"][index].ravel()[:position])
    assert equal(restored[0], restored[1]) and not equal(restored[0], restored[2])
    assert not equal(restored[0], codes)


def test_restoration_of_all_codes_is_a_sample(model, pixels):
    """With the labels, numbers, seed and sampling rule of the samples."""
    arguments = {"seed": 7, "temperature": 0.9}
    restored = model.restore_codes(model.encode(pixels), threshold=-1, labels=["light"] * 4, **arguments)
    assert equal(restored, model.sample_codes(4, classes=["light"], **arguments))


def test_threshold_is_a_number_or_one_per_level(model, pixels):
    """A level with an infinite threshold stays."""
    codes = model.encode(pixels)
    restored = model.restore_codes(codes, threshold={"top": math.inf, "bottom": 0.0})
    assert np.array_equal(restored["top"], codes["top"]) and not np.array_equal(restored["bottom"], codes["bottom"])
    for threshold in ({"top": 1.0}, math.nan):
        with pytest.raises(ValueError, match="threshold must be a number, or one for each of top, bottom, got"):
            model.restore_codes(codes, threshold=threshold)


def test_completion_keeps_the_upper_rows_of_the_codes(model, pixels):
    """All rows give the reconstruction, none give samples, half keep half of each level."""
    codes = model.encode(pixels[0])
    unchanged = model.complete(pixels[0], rows=1, count=2, format="numpy")
    assert np.array_equal(unchanged, model.decode(codes, format="numpy").repeat(2, axis=0))
    samples = model.sample(3, classes=["light"], seed=2, format="numpy")
    assert np.array_equal(model.complete(pixels[0], rows=0, count=3, seed=2, label="light", format="numpy"), samples)
    half = model.complete_codes(codes, rows=0.5, count=3)
    assert all(np.array_equal(half["top"][index, :1], codes["top"][0, :1]) for index in range(3))
    assert all(np.array_equal(half["bottom"][index, :2], codes["bottom"][0, :2]) for index in range(3))
    with pytest.raises(ValueError, match=r"rows must be a fraction from 0 to 1, got 8"):
        model.complete(pixels[0], rows=8)


@pytest.mark.parametrize("label", [None, "light"])
def test_completion_of_several_images_is_refused(model, pixels, label):
    """One image is completed several times."""
    with pytest.raises(ValueError, match="only one image can be completed at a time, got 2"):
        model.complete(list(pixels[:2]), label=label)


def test_rows_of_a_completion_are_exact_at_every_level():
    """15 of 22 rows are 15 and 30, although 15 / 22 * 22 is less than 15 in floats."""
    for height in range(1, 300):
        grids = {"top": Grid(8, height, height), "bottom": Grid(8, 2 * height, 2 * height)}
        for rows in range(height + 1):
            assert check_rows(rows / height, grids) == {"top": rows, "bottom": 2 * rows}


# Table of codes


def test_table_keeps_the_shape_of_the_grids(folder: Path):
    """As pandas, Arrow, arrays and rows."""
    table = vqvae2.codes(folder / "codes")
    codes = open_codes(folder / "codes")
    expected = np.concatenate([codes.split(split).codes["bottom"] for split in codes.splits])
    frame, arrow = table.to_pandas(), table.to_arrow()
    assert len(table) == len(frame) == arrow.num_rows == len(expected) == 12 * 2 + 4
    assert table.columns == list(frame) == arrow.column_names
    assert table.columns == ["split", "key", "copy", "label", "class", "top", "bottom"]
    assert np.array_equal(np.stack(frame["bottom"]), expected) and frame["bottom"][0].shape == (4, 4)
    assert np.array_equal(arrow["bottom"].combine_chunks().to_numpy_ndarray(), expected)
    assert np.array_equal(table["bottom"], expected)
    rows = list(table)
    assert np.array_equal(rows[-1]["bottom"], expected[-1]) and rows[-1]["split"] == "validation"
    assert all(row["class"] == ("dark", "light")[row["label"]] for row in rows)


def test_table_of_a_folder_without_codes_is_refused(tmp_path: Path):
    """The error has the folder and the stage."""
    with pytest.raises(vqvae2.UserError, match=r"is not complete|does not exist"):
        vqvae2.codes(tmp_path)


def test_misspelt_folder_of_codes_is_refused(tmp_path: Path):
    """No stage writes it: the fix is another path."""
    with pytest.raises(vqvae2.UserError, match=r"nowhere does not exist\.[\s\S]*fix: Name the folder") as caught:
        vqvae2.codes(tmp_path / "nowhere")
    assert "vqvae2 run" not in str(caught.value)


# Documentation


@pytest.mark.parametrize(("page", "count"), [("README.md", 1), ("docs/howto.md", 2)])
def test_examples_of_the_documentation_run(folder: Path, tmp_path: Path, pixels, page: str, count: int):
    """The Python examples that use `vqvae2`, one after another, with a class and images of the test."""
    text = (ROOT / page).read_text(encoding="utf-8").replace("flags", "light")
    examples = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "model." in code]
    assert len(examples) == count
    (tmp_path / "artifacts").symlink_to(folder)
    with chdir(tmp_path):
        for name in ("cat.png", "dog.jpg"):
            Image.fromarray(pixels[0]).save(name)
        exec("".join(examples), {})
