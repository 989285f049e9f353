"""Stage `evaluate` on a tiny pipeline with untrained networks, in one process."""

import csv
import io
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from models.config import LevelConfig, PriorConfig, VQVAEConfig
from models.priors import build
from models.vqvae import VQVAE
from stages import codes, evaluate, sample, shard
from stages.config import AugmentConfig, ClusterConfig, CodesConfig, DatasetConfig, EvaluateConfig, SampleConfig
from stages.errors import UserError
from stages.evaluation import ladder, summary, worker
from stages.evaluation.inputs import COMPARED_SETS, EvaluationInputs
from stages.evaluation.summary import HEADLINE_SET_METRICS
from stages.formats import artifact, model_file
from stages.formats.codes import open_codes
from stages.formats.shards import open_shards
from stages.images.tensors import to_float, to_uint8
from stages.inference.trained_models import TrainedModels
from stages.mapping.parts import unpack
from stages.metrics.networks import Network
from stages.metrics.set_metrics import SET_METRICS
from stages.runtime.context import StageContext
from tests.mini_pipeline import without_ray
from tests.screen import Screen

IMAGE_SIZE = 16
LEVELS = {
    "top": LevelConfig(8, channels=8, residual_channels=4, residual_blocks=1, entries=16, dim=4),
    "bottom": LevelConfig(4, channels=8, residual_channels=4, residual_blocks=1, entries=32, dim=4),
}
PRIOR = PriorConfig(
    "pixelcnn",
    channels=8,
    residual_channels=8,
    layers=1,
    attention_layers=0,
    attention_heads=1,
    kernel_size=3,
    output_layers=0,
    condition_layers=1,
)
INPUTS = ("shards", "vqvae", "codes", "priors", "samples")
CONFIG = EvaluateConfig(batch_size=5, max_images=12, nearest_images=2, samples_shown=3, codec_images=3)


class Thumbnail(nn.Module):
    """Cheap feature network: the image reduced to 2 x 2 pixels."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1) / 255


def make_inputs(root: Path, images: dict[str, int], *, classes: tuple[str, ...] = ("red", "blue"), samples: int = 8):
    """Write all inputs of evaluate into a folder and return it."""
    generator = np.random.default_rng(0)
    for split, count in images.items():
        for number in range(count):
            name = classes[number % len(classes)] if classes else ""
            folder = root / "source" / split / name
            folder.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    torch.manual_seed(0)

    def run(stage: str) -> StageContext:
        work = root / "runs" / stage
        work.mkdir(parents=True)
        return StageContext(stage, "f" * 64, work, ClusterConfig())

    metrics = root / "metrics.json"
    dataset = DatasetConfig("tiny", str(root / "source"), IMAGE_SIZE, labels="folders" if classes else "none")
    shard.run(root / "source", root / "shards", metrics, dataset=dataset, context=run("shard"))
    config = VQVAEConfig(LEVELS)
    network = VQVAE(config)
    opened_shards = open_shards(root / "shards")
    training = opened_shards.split("train")
    pixels = torch.from_numpy(np.stack([training.read(index) for index in range(len(training))]))
    output = network(pixels.permute(0, 3, 1, 2) / 127.5 - 1)
    network.absorb({level: quantized.sums for level, quantized in output.levels.items()})
    history = [
        {"step": step, "name": f"{split}/mse", "value": 1 / step}
        for step in (1, 2, 3)
        for split in ("train", "validation")
    ]
    meta = {
        "network": model_file.network_meta(config),
        "classes": list(opened_shards.classes),
        "shards": opened_shards.digest,
    }
    meta |= {"image_size": IMAGE_SIZE}
    model_file.write(root / "vqvae", "vqvae", network.state_dict(), meta, history=history, images={})
    codes.run(
        root / "shards",
        root / "vqvae",
        root / "codes",
        codes=CodesConfig(),
        augment=AugmentConfig(),
        seed=0,
        context=run("codes"),
    )
    opened_codes = open_codes(root / "codes")
    coarser = {}
    for level, shape in opened_codes.levels.items():
        grid = (shape.height, shape.width)
        prior = build(PRIOR, entries=shape.entries, grid=grid, coarser=coarser, classes=len(opened_codes.classes))
        meta = {
            "network": model_file.network_meta(PRIOR),
            "level": level,
            "entries": shape.entries,
            "grid": list(grid),
            "coarser": {name: other._asdict() for name, other in coarser.items()},
            "classes": list(opened_codes.classes),
            "label_counts": [1] * len(opened_codes.classes),
            "vqvae": opened_codes.vqvae,
            "codes": opened_codes.artifact.digest,
        }
        model_file.write(root / "priors" / level, "prior", prior.state_dict(), meta, history=[], images={})
        coarser[level] = shape
    sample.run(
        root / "vqvae", root / "priors", root / "samples", sample=SampleConfig(samples), seed=0, context=run("sample")
    )
    return root


def run_evaluate(root: Path, name: str = "evaluate", **settings: object) -> SimpleNamespace:
    """Run evaluate with some other settings; return all its metrics, output folder, messages and images."""
    screen, out = Screen(), root / name
    network = root / "thumbnail.pt"
    torch.jit.script(Thumbnail()).save(str(network))
    work = out / "work"
    work.mkdir(parents=True, exist_ok=True)
    evaluate.run(
        *(root / folder for folder in INPUTS),
        out / "report",
        out / "metrics.json",
        out / "plots",
        evaluate=replace(CONFIG, **{"networks": {"thumbnail": str(network)}, **settings}),
        seed=0,
        context=StageContext("evaluate", "f" * 64, work, ClusterConfig(), screen),
    )
    metrics = json.loads((out / "report" / "metrics.json").read_text())
    return SimpleNamespace(metrics=metrics, out=out, messages=screen.messages, images=screen.images)


@pytest.fixture(scope="module", autouse=True)
def one_process():
    with without_ray():
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("pipeline"), {"train": 20, "validation": 20})


@pytest.fixture(scope="module")
def evaluated(root) -> SimpleNamespace:
    return run_evaluate(root)


def test_distortion_equals_that_of_encoding_and_decoding_again(root, evaluated):
    """Distortion from the codes on disk equals that of the VQ-VAE's own codes, for a prefix and for all levels."""
    network, _ = model_file.load_vqvae(root / "vqvae")
    images = open_shards(root / "shards").split("validation")
    pixels = torch.from_numpy(np.stack([images.read(i) for i in range(12)])).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.inference_mode():
        encoded = network.encode(pixels)
        mse_all_levels = (network.decode(encoded) - pixels).square().mean().item()
        mse_top = (network.decode({"top": encoded["top"]}, fill="mean") - pixels).square().mean().item()
    values = evaluated.metrics["reconstruction"]["validation"]
    assert values["images"] == 12
    assert values["mse"] == pytest.approx(mse_all_levels, rel=1e-4)
    assert values["top_filled_with_mean"]["mse"] == pytest.approx(mse_top, rel=1e-4)
    assert set(values) == {
        "images",
        "mse",
        "psnr",
        "psnr_8bit",
        "ssim",
        "top_filled_with_zeros",
        "top_filled_with_mean",
    }


def test_max_images_limits_each_split(evaluated):
    """The networks run over max_images of each split, and all image sets are compared at the same N."""
    metrics = evaluated.metrics
    assert metrics["reference"] == "validation"
    assert metrics["reconstruction"]["train"]["images"] == 12
    assert metrics["likelihood"]["top"]["train"]["images"] == 12
    assert metrics["num_images"] == {"train": 20, "validation": 20, "samples": 8, "compared": 8}
    assert {metrics["compared"][name]["images"] for name in COMPARED_SETS} == {8}


def test_each_image_set_has_all_measures(evaluated):
    """Samples, reconstructions and baselines have KID, Fréchet distance, precision and recall, named by the network."""
    names = {f"{metric}_thumbnail" for metric in SET_METRICS}
    for name in COMPARED_SETS:
        assert names <= set(evaluated.metrics["compared"][name])
    assert set(evaluated.metrics["compared"]) >= {"kid_samples_to_random_codes", "kid_samples_to_shuffled_codes"}


def test_untrained_prior_has_the_rate_of_a_uniform_prior(evaluated):
    """The NLL is near ln K nats per code, and the rate under the prior near log2 K bits per code."""
    top = evaluated.metrics["likelihood"]["top"]
    assert top["validation"]["nats_per_code"] == pytest.approx(np.log(16), rel=0.1)
    assert evaluated.metrics["rate"]["top"]["fixed"]["bits_per_pixel"] == 4 * 4 / IMAGE_SIZE**2
    assert evaluated.metrics["rate"]["total"]["prior"]["bits_per_pixel"] == pytest.approx((16 + 16 * 5) / 256, rel=0.1)
    assert evaluated.metrics["rate"]["total"]["files"]["bits_per_pixel"] > 0


def test_codebook_usage_covers_all_images(root, evaluated):
    """Usage counts the codes of all images, not only of max_images."""
    codes_on_disk = open_codes(root / "codes").split("train").codes["bottom"]
    assert codes_on_disk.shape[0] == 20
    assert evaluated.metrics["codebook"]["bottom"]["train"]["used_entries"] == len(np.unique(codes_on_disk))


def test_codes_and_codecs_are_measured_on_the_same_images(root, evaluated):
    """Their points are of the first `codec_images` images: their distortion is that of decoding these again."""
    rows = evaluated.metrics["rate_distortion"]
    assert {row["images"] for row in rows} == {CONFIG.codec_images}
    assert {"fixed", "prior", "files", "jpeg"} <= {row["rate"] for row in rows}
    network, _ = model_file.load_vqvae(root / "vqvae")
    images = open_shards(root / "shards").split("validation")
    first = to_float(torch.from_numpy(np.stack([images.read(index) for index in range(CONFIG.codec_images)])), "cpu")
    with torch.inference_mode():
        mse = (network.decode(network.encode(first)) - first).square().mean().item()
    all_levels = [row["mse"] for row in rows if row["point"] == "top+bottom"]
    assert all_levels == pytest.approx([mse] * 3, rel=1e-4)


def test_plots_are_csv_files_with_headers(evaluated):
    """The plots are rate-distortion, likelihood and codebook usage, with named lines or bars."""
    headers = {path.name: next(csv.reader(path.open())) for path in (evaluated.out / "plots").glob("*.csv")}
    assert headers == {
        "rate_distortion.csv": ["series", "levels", "bits_per_pixel", "mse", "psnr"],
        "nll.csv": ["level", "series", "nll"],
        "codebook_usage.csv": ["rank", "series", "usage"],
    }


def test_headline_metrics_are_few_and_plain(evaluated):
    """The numbers that people compare have plain names, are of validation images and have 6 significant digits."""
    headline = json.loads((evaluated.out / "metrics.json").read_text())
    assert list(headline) == [*HEADLINE_SET_METRICS, "psnr", "ssim"]
    assert headline["psnr"] == evaluated.metrics["reconstruction"]["validation"]["psnr"]
    assert headline["kid"] == evaluated.metrics["compared"]["samples"]["kid_thumbnail"]
    assert all(value == float(f"{value:.6g}") for value in headline.values())


def test_metrics_say_how_the_samples_were_drawn(evaluated):
    """The sampling rule and the fraction accepted are read from the samples."""
    assert evaluated.metrics["sampling"] == {"temperature": 1, "top_k": 0, "top_p": 1, "accepted": 1}


def test_report_shows_each_entry_of_the_codebooks(root, evaluated):
    """A part decodes each entry of a level alone: another image for each."""
    images = unpack((evaluated.out / "work/parts/codebook-bottom-0-32.safetensors").read_bytes())["images"]
    assert images.shape == (32, 16, 16, 3) and len(np.unique(images.reshape(32, -1), axis=0)) == 32


def test_redrawn_images_keep_their_coarser_codes(root, evaluated):
    """A rung of the quality ladder draws the finer level given the real coarser one, as the sampler does."""
    inputs = EvaluationInputs(*(root / name for name in INPUTS))
    codes = inputs.codes_of_first_images("validation", 4)
    models = TrainedModels.load(root / "vqvae", root / "priors")
    known_codes = {"top": torch.from_numpy(codes.codes["top"].astype(np.int64))}
    drawn = models.draw_codes(range(4), codes.labels.tolist(), SampleConfig(), 0, known_codes=known_codes)
    assert (drawn["top"] == known_codes["top"]).all()
    images = to_uint8(models.vqvae.decode(drawn).numpy())
    (path,) = (evaluated.out / "work" / "parts").glob("features-*redrawn_bottom*.safetensors")
    assert (unpack(path.read_bytes())["shown"][:4] == images).all()
    rungs = evaluated.metrics["ladder"]
    assert {rungs[name]["images"] for name in ladder.rungs(LEVELS)} == {6}
    assert list(rungs["steps"]) == ["vqvae", "prior_bottom", "prior_top"]


def test_report_is_an_artifact_with_its_contact_sheets(evaluated):
    """The page, three contact sheets and all metrics are one artifact, and the reporter gets the contact sheets."""
    report = artifact.read(evaluated.out / "report", "report", "evaluate")
    assert set(report.files) == {"report.html", "samples.png", "reconstructions.png", "nearest.png", "metrics.json"}
    assert evaluated.images == ["samples", "reconstructions", "nearest"]


def test_second_run_gives_the_same_bytes(root, evaluated):
    """All outputs are a function of the inputs, the settings and the seed."""
    again = run_evaluate(root, "again")
    assert again.metrics == evaluated.metrics
    for name in ("report/report.html", "metrics.json", "plots/codebook_usage.csv", "report/manifest.json"):
        assert (again.out / name).read_bytes() == (evaluated.out / name).read_bytes()


def test_interrupted_run_measures_only_missing_parts(root):
    """A run in the work folder of an interrupted run computes the missing part and keeps the files of the others."""
    first = run_evaluate(root, "interrupted")
    paths = sorted((first.out / "work" / "parts").glob("*.safetensors"))
    missing = first.out / "work" / "parts" / "features-thumbnail-samples-0-8.safetensors"
    missing.unlink()
    (first.out / "report" / artifact.MANIFEST).unlink()
    times = {path: path.stat().st_mtime_ns for path in paths if path != missing}
    second = run_evaluate(root, "interrupted")
    assert second.metrics == first.metrics
    assert missing.exists() and len(times) == len(paths) - 1
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert (second.out / "report" / artifact.MANIFEST).exists()


def test_single_image_omits_measures_of_several_images(tmp_path):
    """Measures that need more images are left out, and a message says so."""
    evaluated = run_evaluate(make_inputs(tmp_path, {"train": 1}, classes=(), samples=1))
    assert evaluated.metrics["reference"] == "train" and evaluated.metrics["num_images"]["compared"] == 1
    assert "kid_thumbnail" not in evaluated.metrics["compared"]["samples"]
    assert "KID (kid) is omitted: it needs 2 images of each set, got 1." in evaluated.messages
    assert evaluated.metrics["reconstruction"]["train"]["mse"] > 0


def test_codes_of_other_shards_are_refused(root, tmp_path):
    """The error names an image without codes, and the stage that computes them."""
    other = make_inputs(tmp_path, {"train": 30, "validation": 9})
    inputs = EvaluationInputs(other / "shards", *(root / name for name in INPUTS[1:]))
    with pytest.raises(UserError, match="The codes have no row for train image") as caught:
        inputs.codes_of_first_images("train", 30)
    assert (caught.value.where, caught.value.code) == (str(root / "codes"), 4)
    assert caught.value.fix == "Run: vqvae2 run --stage codes"


def test_notes_name_collapse_omitted_measures_few_images_better_baselines_and_copies():
    """Each problem gives one sentence; an evaluation without problems gives none."""
    uniform = {"train": np.full(8, 5)}
    collapsed = {"train": np.array([40, 0, 0, 0, 0, 0, 0, 0])}
    metrics = {
        "codebook": summary.codebook({"top": uniform}),
        "reference": "validation",
        "neighbours": {},
        "compared": {},
    }
    enough_images = max(metric.min_images(CONFIG) for metric in SET_METRICS.values())
    networks = [Network("thumbnail", "thumbnail.pt", "0" * 64)]
    assert summary.notes(metrics, enough_images, networks, CONFIG) == []
    metrics = {
        "codebook": summary.codebook({"top": collapsed, "bottom": uniform}),
        "reference": "train",
        "neighbours": {"pixels": {"samples_copies": 3}},
        "compared": {
            "samples": {"kid_thumbnail": 0.25, "recall_thumbnail": 0.5},
            "random_codes": {"kid_thumbnail": 0.5, "recall_thumbnail": 0.25},
            "shuffled_codes": {"kid_thumbnail": 0.125, "recall_thumbnail": 0.5},
        },
    }
    assert summary.notes(metrics, enough_images, networks, CONFIG) == [
        "Level top is collapsed: its perplexity is 1.0 of 8 entries, below 25%. Its prior has little to learn.",
        "There are few validation images, so image sets are compared with training images instead.",
        "The baseline of shuffled codes beats the samples by features of thumbnail in kid (0.125, samples 0.25): there "
        "the priors are of no use, or the metric misses what they learned.",
        "3 samples are exact copies of training images, pixel by pixel.",
    ]
    with_one_image = summary.notes(metrics, 1, networks, CONFIG)
    assert len(with_one_image) == 4 + len(SET_METRICS)
    assert "KID (kid) is omitted: it needs 2 images of each set, got 1." in with_one_image


@pytest.mark.parametrize(("folder", "stage"), [("codes", "codes"), ("samples", "sample"), ("priors", "prior_top")])
def test_artifact_of_another_vqvae_is_refused(root, tmp_path, folder: str, stage: str):
    """Codes, samples and priors must come from the evaluated VQ-VAE; the error names the stage to run."""
    inputs = {name: root / name for name in INPUTS}
    shutil.copytree(inputs[folder], tmp_path / folder)
    path = tmp_path / folder / ("top" if folder == "priors" else "") / artifact.MANIFEST
    manifest = json.loads(path.read_bytes())
    manifest["meta"]["vqvae"] = "0" * 64
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=rf"made with VQ-VAE \w+, got VQ-VAE 0+\.[\s\S]*--stage {stage}"):
        EvaluationInputs(*{**inputs, folder: tmp_path / folder}.values()).check()


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_damaged_samples_are_refused(root, tmp_path, kind: str):
    """A flipped bit in a file of the samples, even in a tar header, is found by its hash."""
    shutil.copytree(root / "samples", tmp_path / "samples")
    path = sorted((tmp_path / "samples").glob(f"*.{kind}"))[0]
    data = bytearray(path.read_bytes())
    data[130] ^= 1
    path.write_bytes(data)
    other_inputs = [root / name for name in INPUTS[:-1]]
    with pytest.raises(UserError, match=rf"{path.name} is damaged[\s\S]*Delete {tmp_path}"):
        EvaluationInputs(*other_inputs, tmp_path / "samples").check()


def test_codes_of_first_images_have_the_order_of_the_images(root):
    """The codes of the first three images are the first three rows of the codes of all images."""
    inputs = EvaluationInputs(*(root / name for name in INPUTS))
    all_codes, first = inputs.codes_of_first_images("train", 20), inputs.codes_of_first_images("train", 3)
    assert list(first.keys) == list(all_codes.keys)[:3] == inputs.images("train").keys[:3].tolist()
    assert all((first.codes[level] == all_codes.codes[level][:3]).all() for level in all_codes.codes)


def test_shuffled_codes_keep_each_position_and_change_every_image():
    """Each position has the same codes as before, and each code belongs to another image than before."""
    grids = np.arange(7 * 2 * 3).reshape(7, 2, 3)
    shuffled = worker.shuffle_codes(grids, np.random.default_rng(0))
    assert (np.sort(shuffled, axis=0) == grids).all()
    assert (shuffled != grids).all()
    assert len({tuple(row) for row in (shuffled.reshape(7, -1) // 6).tolist()}) == 7


def test_evaluation_without_samples_is_refused():
    """The error states the number of samples and of reference images."""
    inputs = SimpleNamespace(images=lambda split: range(5), samples=SimpleNamespace(count=0), samples_folder="samples")
    with pytest.raises(UserError, match=r"got 0 samples and 5 \w+ images\.") as caught:
        evaluate._plan(inputs, CONFIG, seed=0)
    assert caught.value.where == "samples" and "sample.count" in caught.value.fix and caught.value.code == 4


def test_missing_samples_are_refused(root):
    """The error states how many samples are missing, the first of them, and the command that creates them again."""
    samples = EvaluationInputs(*(root / name for name in INPUTS)).samples
    with pytest.raises(UserError, match=r"2 samples are missing, first number 8\.") as caught:
        samples.images(7, 10)
    assert caught.value.where == str(root / "samples") and "--stage sample --force" in caught.value.fix


class Published(nn.Module):
    """Feature network with the signature of the published Inception network: features only if asked for."""

    def forward(self, img: torch.Tensor, return_features: bool = False, use_fp16: bool = False) -> torch.Tensor:
        features = nn.functional.adaptive_avg_pool2d(img, 1).flatten(1)
        return features if return_features else features.softmax(dim=1)


def test_second_network_has_metrics_and_neighbours_of_its_own(root, evaluated, tmp_path):
    """The first network's metrics stay the same. The report records the SHA-256 of both files."""
    path = tmp_path / "colours.pt"
    torch.jit.script(Published()).save(str(path))
    networks = {"thumbnail": str(root / "thumbnail.pt"), "colours": str(path)}
    both = run_evaluate(root, "two_networks", networks=networks)
    for name in COMPARED_SETS:
        first = evaluated.metrics["compared"][name]
        assert first.items() <= both.metrics["compared"][name].items()
        assert {f"{metric}_colours" for metric in SET_METRICS} <= set(both.metrics["compared"][name])
    assert list(both.metrics["neighbours"]) == ["pixels", "features", "features_colours"]
    meta = artifact.read(both.out / "report", "report", "evaluate").meta
    assert meta["networks"]["colours"] == both.metrics["networks"]["colours"] == artifact.sha256(path)
    assert json.loads((both.out / "metrics.json").read_text()) == json.loads(
        (evaluated.out / "metrics.json").read_text()
    )


def plant_training_images(root: Path, folder: Path, positions: list[int]) -> None:
    """Write samples whose images are training images of these positions."""
    context = StageContext("sample", "f" * 64, folder / "work", ClusterConfig())
    context.work_dir.mkdir()
    config = SampleConfig(len(positions))
    sample.run(root / "vqvae", root / "priors", folder / "drawn", sample=config, seed=0, context=context)
    drawn, training = artifact.read(folder / "drawn", "samples"), open_shards(root / "shards").split("train")
    with artifact.commit_folder(folder / "samples", "samples", dict(drawn.meta)) as planted:
        for name in drawn.files:
            shutil.copyfile(drawn.path(name), planted / name)
        (tar_name,) = (name for name in drawn.files if name.endswith(".tar"))
        with tarfile.open(planted / tar_name, "w") as tar:
            for number, position in enumerate(positions):
                buffer = io.BytesIO()
                Image.fromarray(training.read(position)).save(buffer, "PNG")
                member = tarfile.TarInfo(f"{number:05d}.png")
                member.size = len(buffer.getvalue())
                tar.addfile(member, io.BytesIO(buffer.getvalue()))


def test_copies_of_training_images_are_found_wherever_they_are(root, tmp_path):
    """16 of 16 samples that are training images, by pixels and by features. With a limit, only those within it."""
    positions = [19, 3, 18, 0, 12, 7, 16, 17, 1, 2, 4, 5, 13, 14, 15, 6]
    plant_training_images(root, tmp_path, positions)
    for name in INPUTS[:-1]:
        (tmp_path / name).symlink_to(root / name)
    unlimited = run_evaluate(tmp_path, max_images=16)
    neighbours = unlimited.metrics["neighbours"]
    assert [neighbours[space]["samples_copies"] for space in ("pixels", "features")] == [16, 16]
    assert [neighbours[space]["searched"] for space in ("pixels", "features")] == [20, 20]
    assert "Searched 20 training images for the nearest to 16 samples and 16 validation images." in unlimited.messages
    limited = run_evaluate(tmp_path, "limited", max_images=16, search_images=10)
    within = sum(position < 10 for position in positions)
    assert [limited.metrics["neighbours"][space]["samples_copies"] for space in ("pixels", "features")] == [within] * 2


def test_reference_is_chosen_by_the_setting(root, evaluated):
    """With both splits, the metrics of the first are those of it alone, and those of the second have other names."""
    both = run_evaluate(root, "both", reference="both")
    assert evaluated.metrics["compared"].items() <= both.metrics["compared"].items()
    train = run_evaluate(root, "train", reference="train")
    assert (both.metrics["reference"], train.metrics["reference"]) == ("validation", "train")
    assert both.metrics["compared"]["samples_to_train"] == train.metrics["compared"]["samples"]
    assert "validation_to_train_median" in train.metrics["neighbours"]["pixels"]
    assert not any("few validation images" in message for message in train.messages)
    html = (both.out / "report" / "report.html").read_text()
    assert "baseline: random codes, compared with training images" in html


def test_validation_reference_without_validation_images_is_refused(tmp_path):
    """The error names the split and the setting."""
    inputs = SimpleNamespace(
        images=lambda split: range(5 if split == "train" else 0),
        samples=SimpleNamespace(count=3),
        samples_folder="samples",
    )
    with pytest.raises(UserError, match=r"got 3 samples and 0 validation images\.") as caught:
        evaluate._plan(inputs, replace(CONFIG, reference="validation"), seed=0)
    assert "evaluate.reference" in caught.value.fix


def test_random_codes_are_those_of_one_draw():
    """They are drawn in pieces, which changes nothing but the memory."""
    grids = np.zeros((worker.CODES_ROWS + 5, 3, 2), np.uint16)
    drawn = worker.random_codes(grids, 300, np.random.default_rng(1))
    assert drawn.dtype == np.uint16
    assert (drawn == np.random.default_rng(1).integers(300, size=grids.shape)).all()
