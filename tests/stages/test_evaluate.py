"""The whole of evaluate, on a tiny pipeline whose networks have learnt nothing, in one process."""

import csv
import json
import shutil
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
from stages.evaluation import summary, worker
from stages.formats import artifact, model_file
from stages.formats.codes import open_codes
from stages.formats.shards import open_shards
from stages.metrics import COMPARISONS
from stages.runtime.context import StageContext
from tests.screen import Screen

SIDE = 16
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
CONFIG = EvaluateConfig(batch_size=5, max_images=12, nearest_images=2, samples_shown=3)


class Thumbnail(nn.Module):
    """A feature network that costs nothing: four pixels of each colour."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1) / 255


def serial(worker, arguments, parts, *, context, unit):
    """Stand in for Ray: one worker, one part after another, in memory."""
    call = worker(*arguments)
    return [call(json.loads(json.dumps(part))) for part in parts]


def pipeline(root: Path, images: dict[str, int], *, classes: tuple[str, ...] = ("red", "blue"), samples: int = 8):
    """Make every input of evaluate, from pictures to samples."""
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
    dataset = DatasetConfig("tiny", str(root / "source"), SIDE, labels="folders" if classes else "none")
    shard.run(root / "source", root / "shards", metrics, dataset=dataset, context=run("shard"))
    config = VQVAEConfig(LEVELS)
    network = VQVAE(config)
    found = open_shards(root / "shards")
    first = torch.from_numpy(np.stack([found.split("train").read(i) for i in range(len(found.split("train")))]))
    network.absorb({k: q.sums for k, q in network(first.permute(0, 3, 1, 2) / 127.5 - 1).levels.items()})
    history = [
        {"step": s, "name": f"{split}/mse", "value": 1 / s} for s in (1, 2, 3) for split in ("train", "validation")
    ]
    meta = {"network": model_file.network_meta(config), "classes": list(found.classes), "shards": found.digest}
    meta |= {"image_size": SIDE}
    model_file.write(root / "vqvae", "vqvae", network.state_dict(), meta, history=history, pictures={})
    codes.run(
        root / "shards",
        root / "vqvae",
        root / "codes",
        metrics,
        codes=CodesConfig(),
        augment=AugmentConfig(),
        seed=0,
        context=run("codes"),
    )
    made = open_codes(root / "codes")
    coarser = {}
    for level, shape in made.levels.items():
        grid = (shape.height, shape.width)
        prior = build(PRIOR, entries=shape.entries, grid=grid, coarser=coarser, classes=len(made.classes))
        meta = {
            "network": model_file.network_meta(PRIOR),
            "level": level,
            "entries": shape.entries,
            "grid": list(grid),
            "coarser": {name: other._asdict() for name, other in coarser.items()},
            "classes": list(made.classes),
            "label_counts": [1] * len(made.classes),
            "vqvae": made.vqvae,
            "codes": made.found.digest,
        }
        model_file.write(root / "priors" / level, "prior", prior.state_dict(), meta, history=[], pictures={})
        coarser[level] = shape
    sample.run(
        root / "vqvae", root / "priors", root / "samples", sample=SampleConfig(samples), seed=0, context=run("sample")
    )
    return root


def measure(root: Path, name: str = "evaluate") -> SimpleNamespace:
    """Run evaluate; give its numbers, its folder and what it said."""
    not_ignored, out = Screen(), root / name
    network = root / "thumbnail.pt"
    torch.jit.script(Thumbnail()).save(str(network))
    work = out / "work"
    work.mkdir(parents=True)
    evaluate.run(
        *(root / folder for folder in ("shards", "vqvae", "codes", "priors", "samples")),
        out / "report",
        out / "metrics.json",
        out / "plots",
        evaluate=replace(CONFIG, feature_weights=str(network)),
        seed=0,
        context=StageContext("evaluate", "f" * 64, work, ClusterConfig(), not_ignored),
    )
    numbers = json.loads((out / "metrics.json").read_text())
    return SimpleNamespace(numbers=numbers, out=out, notes=not_ignored.notes, pictures=not_ignored.pictures)


@pytest.fixture(scope="module", autouse=True)
def one_process():
    with pytest.MonkeyPatch.context() as patch:
        for module in (shard, codes, sample, evaluate):
            patch.setattr(module, "map_parts", serial)
        patch.setattr(evaluate, "FEWEST_REFERENCE", 6)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return pipeline(tmp_path_factory.mktemp("pipeline"), {"train": 20, "validation": 9})


@pytest.fixture(scope="module")
def found(root) -> SimpleNamespace:
    return measure(root)


def test_reconstructions_are_measured_from_the_codes_on_disk(root, found):
    """Each prefix of levels, each filling, and the whole: equal to decoding what the VQ-VAE encodes, image by image."""
    network, _ = model_file.load_vqvae(root / "vqvae")
    images = open_shards(root / "shards").split("validation")
    pixels = torch.from_numpy(np.stack([images.read(i) for i in range(9)])).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.inference_mode():
        encoded = network.encode(pixels)
        whole = (network.decode(encoded) - pixels).square().mean().item()
        top = (network.decode({"top": encoded["top"]}, fill="mean") - pixels).square().mean().item()
    measured = found.numbers["reconstruction"]["validation"]
    assert measured["images"] == 9
    assert measured["mse"] == pytest.approx(whole, rel=1e-4)
    assert measured["top_filled_with_mean"]["mse"] == pytest.approx(top, rel=1e-4)
    assert set(measured) == {"images", "mse", "psnr", "ssim", "top_filled_with_zeros", "top_filled_with_mean"}


def test_networks_run_over_no_more_images_than_asked_for(found):
    """max_images bounds each split, and N is the same for every set."""
    numbers = found.numbers
    assert numbers["reconstruction"]["train"]["images"] == 12
    assert numbers["likelihood"]["top"]["train"]["images"] == 12
    assert numbers["num_images"] == {"train": 20, "validation": 9, "samples": 8, "compared": 8}
    assert {numbers["compared"][name]["images"] for name in worker.SETS} == {8}


def test_every_measure_carries_its_network_and_both_controls_stand_beside(found):
    """KID, Fréchet distance, precision and recall of the samples, the reconstructions and the controls."""
    names = {f"{measure}_thumbnail" for measure in ("kid", "fd", "precision", "recall")}
    for name in worker.SETS:
        assert names <= set(found.numbers["compared"][name])
    assert set(found.numbers["compared"]) >= {"kid_samples_to_random_codes", "kid_samples_to_shuffled_codes"}


def test_an_untrained_prior_costs_what_a_uniform_one_does(found):
    """NLL is near ln K, and the rate under the prior near log2 K per code, in the same units."""
    top = found.numbers["likelihood"]["top"]
    assert top["validation"]["nats_per_code"] == pytest.approx(np.log(16), rel=0.1)
    assert found.numbers["rate"]["top"]["fixed"]["bits_per_pixel"] == 4 * 4 / SIDE**2
    assert found.numbers["rate"]["total"]["prior"]["bits_per_pixel"] == pytest.approx((16 + 16 * 5) / 256, rel=0.1)
    assert found.numbers["rate"]["total"]["files"]["bits_per_pixel"] > 0


def test_usage_counts_every_code_of_every_plain_image(root, found):
    """All images count, not only those that networks ran over."""
    codes_on_disk = open_codes(root / "codes").split("train").codes["bottom"]
    assert codes_on_disk.shape[0] == 20
    assert found.numbers["codebook"]["bottom"]["train"]["used_entries"] == len(np.unique(codes_on_disk))


def test_plots_are_tables_that_dvc_draws(found):
    """Rate against distortion, likelihoods, and usage per level, each with its header."""
    headers = {path.name: next(csv.reader(path.open())) for path in (found.out / "plots").iterdir()}
    assert headers == {
        "rate_distortion.csv": ["levels", "rate", "bits_per_pixel", "mse", "psnr"],
        "nll.csv": ["level", "split", "nats_per_code", "bits_per_code"],
        "usage_top.csv": ["rank", "train", "validation"],
        "usage_bottom.csv": ["rank", "train", "validation"],
    }


def test_the_report_is_an_artifact_with_its_pictures_beside_it(found):
    """The page and three sheets, committed with hashes, and shown to whoever tracks the run."""
    report = artifact.read(found.out / "report", "report", "evaluate")
    assert set(report.files) == {"report.html", "samples.png", "reconstructions.png", "nearest.png"}
    assert found.pictures == ["samples", "reconstructions", "nearest"]


def test_a_second_run_gives_the_same_bytes(root, found):
    """Everything is a function of the inputs, the settings and the seed."""
    again = measure(root, "again")
    assert again.numbers == found.numbers
    for name in ("report/report.html", "plots/usage_top.csv", "report/manifest.json"):
        assert (again.out / name).read_bytes() == (found.out / name).read_bytes()


def test_finished_parts_are_not_measured_again(root, found, monkeypatch):
    """After an interruption only the missing parts run."""
    monkeypatch.setattr(worker.Measurer, "features", lambda *_: pytest.fail("features were computed again"))
    (found.out / "report" / artifact.MANIFEST).unlink()
    not_ignored = Screen()
    evaluate.run(
        *(root / folder for folder in ("shards", "vqvae", "codes", "priors", "samples")),
        found.out / "report",
        found.out / "metrics.json",
        found.out / "plots",
        evaluate=replace(CONFIG, feature_weights=str(root / "thumbnail.pt")),
        seed=0,
        context=StageContext("evaluate", "f" * 64, found.out / "work", ClusterConfig(), not_ignored),
    )
    assert (found.out / "report" / artifact.MANIFEST).exists()


def test_one_image_only_is_measured_as_far_as_one_image_can_be(tmp_path):
    """What needs more images is left out, and said."""
    found = measure(pipeline(tmp_path, {"train": 1}, classes=(), samples=1))
    assert found.numbers["reference"] == "train" and found.numbers["num_images"]["compared"] == 1
    assert "kid_thumbnail" not in found.numbers["compared"]["samples"]
    assert "KID (kid) needs 2 images of each set; here there are 1." in found.notes
    assert found.numbers["reconstruction"]["train"]["mse"] > 0


def test_codes_of_other_shards_are_refused(root, tmp_path):
    """An image without codes is named, with the stage that makes them."""
    other = pipeline(tmp_path, {"train": 30, "validation": 9})
    inputs = worker.Inputs(other / "shards", root / "vqvae", root / "codes", root / "priors", root / "samples")
    with pytest.raises(UserError, match="The codes hold no image") as caught:
        inputs.plain_codes("train", 30)
    assert (caught.value.where, caught.value.code) == (str(root / "codes"), 4)
    assert caught.value.fix == "Run: vqvae2 run --stage codes"


def test_what_a_reader_must_not_miss_is_said_in_sentences():
    """And nothing where there is nothing to say."""
    fine = {"train": np.full(8, 5)}
    one = {"train": np.array([40, 0, 0, 0, 0, 0, 0, 0])}
    numbers = {"codebook": summary.codebook({"top": fine}), "reference": "validation", "neighbours": {}}
    many = max(comparison.fewest(CONFIG) for comparison in COMPARISONS.values())
    assert summary.notes(numbers, many, CONFIG) == []
    numbers = {
        "codebook": summary.codebook({"top": one, "bottom": fine}),
        "reference": "train",
        "neighbours": {"pixels": {"samples_copies": 3}},
    }
    assert summary.notes(numbers, many, CONFIG) == [
        "Level top is collapsed: its perplexity is 1.0 of 8 entries, below a quarter, so it leaves its prior little "
        "to learn.",
        "There are few validation images, so sets of images are held against training images.",
        "3 samples are, pixel by pixel, training images.",
    ]
    few = summary.notes(numbers, 1, CONFIG)
    assert len(few) == 3 + len(COMPARISONS) and "KID (kid) needs 2 images of each set; here there are 1." in few


@pytest.mark.parametrize(("folder", "stage"), [("codes", "codes"), ("samples", "sample"), ("priors", "prior_top")])
def test_what_another_vqvae_made_is_refused(root, tmp_path, folder: str, stage: str):
    """Nothing is decoded by a VQ-VAE that does not know its codes."""
    inputs = {name: root / name for name in ("shards", "vqvae", "codes", "priors", "samples")}
    shutil.copytree(inputs[folder], tmp_path / folder)
    path = tmp_path / folder / ("top" if folder == "priors" else "") / artifact.MANIFEST
    manifest = json.loads(path.read_bytes())
    manifest["meta"]["vqvae"] = "0" * 64
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=rf"made with VQ-VAE 0+, but[\s\S]*--stage {stage}"):
        worker.Inputs(*{**inputs, folder: tmp_path / folder}.values()).check()


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_damaged_samples_are_named_before_anything_is_measured(root, tmp_path, kind: str):
    """A flipped bit in the header of a tar could hide images, or have them looked for without end."""
    shutil.copytree(root / "samples", tmp_path / "samples")
    path = sorted((tmp_path / "samples").glob(f"*.{kind}"))[0]
    data = bytearray(path.read_bytes())
    data[130] ^= 1
    path.write_bytes(data)
    others = [root / name for name in ("shards", "vqvae", "codes", "priors")]
    with pytest.raises(UserError, match=rf"{path.name} is damaged[\s\S]*Delete {tmp_path}"):
        worker.Inputs(*others, tmp_path / "samples").check()


def test_the_first_codes_are_read_from_the_files_that_hold_them(root):
    """A million images' codes are not read to measure some."""
    inputs = worker.Inputs(*(root / name for name in ("shards", "vqvae", "codes", "priors", "samples")))
    whole, first = inputs.plain_codes("train", 20), inputs.plain_codes("train", 3)
    assert list(first.keys) == list(whole.keys)[:3] == inputs.images("train").keys[:3].tolist()
    assert all((first.codes[level] == whole.codes[level][:3]).all() for level in whole.codes)


def test_shuffling_keeps_each_positions_codes_and_leaves_none_with_its_image():
    """Every position holds the same codes as before, each now with another image."""
    grids = np.arange(7 * 2 * 3).reshape(7, 2, 3)
    made = worker.shuffled(grids, np.random.default_rng(0))
    assert (np.sort(made, axis=0) == grids).all()
    assert (made != grids).all()
    assert len({tuple(row) for row in (made.reshape(7, -1) // 6).tolist()}) == 7


def test_nothing_to_compare_is_an_error_that_counts():
    """Samples or images: whichever there are none of."""
    inputs = SimpleNamespace(images=lambda split: range(5), samples=SimpleNamespace(count=0), samples_folder="samples")
    with pytest.raises(UserError, match=r"nothing to compare: 0 samples, 5 \w+ images\.") as caught:
        evaluate._plan(inputs, CONFIG, seed=0)
    assert caught.value.where == "samples" and "sample.count" in caught.value.fix and caught.value.code == 4


def test_samples_that_are_missing_are_counted(root):
    """With the first of their numbers, and the command that draws them anew."""
    samples = worker.Inputs(*(root / name for name in ("shards", "vqvae", "codes", "priors", "samples"))).samples
    with pytest.raises(UserError, match=r"2 samples are missing, first number 8\.") as caught:
        samples.images(7, 10)
    assert caught.value.where == str(root / "samples") and "--stage sample --force" in caught.value.fix
