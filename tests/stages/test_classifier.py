"""The stages classifier and reject on the small pipeline."""

import csv
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from models.classifier import Classifier
from models.config import ClassifierConfig
from models.efficientnet import EfficientNetLite2
from stages import classifier, reject
from stages.classifier import ClassifierObjective
from stages.config import ClassifierStageConfig
from stages.errors import UserError
from stages.formats import artifact, model_file, pretrained
from stages.formats.samples import open_samples
from stages.formats.shards import open_shards
from stages.formats.training_images import open_images
from stages.images.tensors import to_float, to_uint8
from stages.training.distributed import DistributedContext
from stages.training.labelled_batches import ImagesWithLabels, LabelledBatch
from stages.training.loop import TrainingStopped
from tests import mini_pipeline
from tests.mini_pipeline import MiniPipeline, without_ray
from tests.pretrained import install_weights

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture(scope="module")
def scored(project: MiniPipeline) -> MiniPipeline:
    """The small pipeline with a critic and accepted samples."""
    with without_ray():
        project.classifier()
        project.reject()
    return project


def digest(folder: Path) -> str:
    return artifact.sha256(folder / artifact.MANIFEST)


def meta(folder: Path) -> dict:
    return json.loads((folder / artifact.MANIFEST).read_bytes())["meta"]


def test_a_stopped_classifier_resumes_to_equal_files(scored):
    """The classifier of a resumed training equals that of an unbroken one."""

    def fit_and_stop(train_worker, arguments, *, context):
        train_worker(dist=DistributedContext(stop_requested=lambda: True), context=context, **arguments)

    run_stage = partial(scored.classifier, out="stopped", fingerprint="stopped")
    with without_ray(fit=fit_and_stop), pytest.raises(TrainingStopped, match="step 1"):
        run_stage()
    run_stage()
    assert digest(scored.path("stopped") / "shards") == digest(scored.path("classifiers") / "shards")


def test_a_pretrained_classifier_resumes_and_is_complete_without_the_package_of_its_weights(
    project, tmp_path, monkeypatch
):
    """Its trunk has the published weights, and only the linear layer differs from the untrained network."""

    def fit_and_stop(train_worker, arguments, *, context):
        train_worker(dist=DistributedContext(stop_requested=lambda: True), context=context, **arguments)

    network = ClassifierConfig(name="efficientnet_lite2")
    train = replace(mini_pipeline.TRAIN, steps=2, evaluate_every=2)
    monkeypatch.setattr(mini_pipeline, "CLASSIFIER", ClassifierStageConfig(network, train))
    monkeypatch.setattr(EfficientNetLite2, "input_size", 32)
    with pytest.raises(UserError, match="are not installed"), monkeypatch.context() as patch:
        package = pretrained.CRITIC_PACKAGES[network.name]._replace(distribution="no_such_package")
        patch.setitem(pretrained.CRITIC_PACKAGES, network.name, package)
        project.classifier(out="pretrained", fingerprint="refused")
    install_weights(tmp_path / "site-packages", monkeypatch)
    project.classifier(out="pretrained", fingerprint="pretrained")
    run_stage = partial(project.classifier, out="pretrained_stopped", fingerprint="pretrained_stopped")
    with without_ray(fit=fit_and_stop), pytest.raises(TrainingStopped, match="step 1"):
        run_stage()
    run_stage()
    folder = project.path("pretrained") / "shards"
    assert digest(folder) == digest(project.path("pretrained_stopped") / "shards")
    torch.manual_seed(0)  # as the stage
    untrained = classifier.build_network(network, 2).state_dict()
    monkeypatch.undo()
    trained = model_file.load_classifier(folder, "classifier_shards")[0].state_dict()
    different = {name for name, weight in trained.items() if not torch.equal(weight, untrained[name])}
    assert different == {"logits.weight", "logits.bias"} and trained.keys() == untrained.keys()
    assert meta(folder)["network"]["name"] == "efficientnet_lite2"


def test_manifest_of_a_residual_network_has_no_name(scored):
    """Manifests are as they were before there was another network."""
    assert "name" not in meta(scored.path("classifiers") / "shards")["network"]


def test_accuracy_counts_the_most_probable_classes():
    """Top-1 and top-5 of known logits; the loss is the mean cross-entropy."""
    network = torch.nn.Flatten()  # the pixels of 1 x 2 images are the logits of 6 classes
    objective = ClassifierObjective(network, 6)  # type: ignore[arg-type]
    pixels = torch.tensor([[250, 200, 150, 100, 50, 0]] * 3, dtype=torch.uint8).reshape(3, 1, 1, 6)
    batch = LabelledBatch(pixels[..., :3].repeat(1, 1, 2, 1), torch.tensor([0, 1, 2]))
    batch.images[:, 0, 1] = pixels[:, 0, 0, 3:]
    logits = to_float(batch.images, "cpu").flatten(1)  # channel by channel: 250 100, 200 50, 150 0
    values = objective.summarize(objective.measure(network, batch, DistributedContext()))
    assert values["top1"] == pytest.approx(1 / 3) and values["top5"] == pytest.approx(1)
    assert values["balanced_accuracy"] == pytest.approx(1 / 3)
    assert values["nats"] == pytest.approx(torch.nn.functional.cross_entropy(logits, batch.labels).item())


def test_balanced_accuracy_gives_each_class_the_same_weight():
    """Always the most frequent of three classes: top-1 is its share, the balanced accuracy 1/3; sums are additive."""
    network = torch.nn.Flatten()  # 1 x 1 images: three logits
    objective = ClassifierObjective(network, 4)  # type: ignore[arg-type]
    first_class = torch.tensor([250, 100, 50], dtype=torch.uint8).expand(6, 1, 1, 3)
    labels = torch.tensor([0, 0, 0, 0, 1, 2])  # and none of class 3
    parts = [
        objective.measure(network, LabelledBatch(first_class[rows], labels[rows]), DistributedContext())
        for rows in (slice(0, 4), slice(4, 6))
    ]
    values = objective.summarize({name: parts[0][name] + parts[1][name] for name in parts[0]})
    assert (values["top1"], values["balanced_accuracy"]) == pytest.approx((4 / 6, 1 / 3))


def test_classifier_of_reconstructions_learns_from_what_the_vqvae_decodes(scored, tmp_path, monkeypatch):
    """The reconstructions have the keys and labels of the training images, and are deleted when the stage has ended."""
    captured = []
    original = classifier.train_or_load

    def capture(train_worker, arguments, *rest, **options):
        images = open_images(arguments["images"], dataset)
        captured.append(([images.read(index) for index in range(len(images))], images.labels, arguments["images"]))
        return original(train_worker, arguments, *rest, **options)

    dataset = open_shards(scored.path("shards"))
    monkeypatch.setattr(classifier, "train_or_load", capture)
    scored.classifier("vqvae")
    read, labels, folder = captured[0]
    training_images = dataset.split("train")
    network, _ = model_file.load_vqvae(scored.path("vqvae"))
    batch = np.stack([training_images.read(index) for index in range(len(training_images))])
    with torch.inference_mode():
        expected = to_uint8(network(to_float(torch.from_numpy(batch), "cpu")).reconstruction.numpy())
    assert np.abs(np.stack(read).astype(int) - expected).max() <= 1  # other batches round differently
    assert (labels == training_images.labels).all() and not folder.exists()


@pytest.mark.parametrize("images", ["samples", "accepted"])
def test_classifier_of_samples_is_tested_on_real_images(scored, images):
    """The same stage trains on samples; its metrics are those of the real validation images."""
    scored.classifier(images)
    accuracy = json.loads(scored.files(f"classifier_{images}")[0].read_text())
    assert accuracy["images"] == 4 and accuracy["top1_most_frequent_class"] == 0.5
    assert 0 <= accuracy["top1"] <= accuracy["top5"] <= 1 and 0 <= accuracy["balanced_accuracy"] <= 1
    assert meta(scored.path("classifiers") / images)["trained_on"] == images


def test_images_without_a_label_are_left_out():
    """A classifier neither learns from them nor is tested on them."""

    class Images:
        labels = np.array([1, -1, 0])

        def read(self, position):
            return position

    images = ImagesWithLabels(Images())
    assert len(images) == 2 and images.labels.tolist() == [1, 0] and images.read(1) == 2


@pytest.mark.parametrize(
    ("classes", "expected"), [([], "2 or more classes, got 0"), (["a"], "2 or more classes, got 1")]
)
def test_fewer_than_two_classes_are_refused(scored, tmp_path, classes, expected):
    """There is nothing to tell apart."""
    with artifact.commit_folder(tmp_path / "shards", "shards", {"classes": classes, "image_size": 16}) as folder:
        for path in scored.path("shards").iterdir():
            if path.name != artifact.MANIFEST:
                artifact.link_or_copy(path, folder / path.name)
    with pytest.raises(UserError, match=expected):
        classifier.check_classes(open_shards(tmp_path / "shards"))


def test_accepted_samples_are_the_best_candidates(scored):
    """Images, codes and labels of the accepted samples are those of the candidates that scores.csv names."""
    candidates, accepted = open_samples(scored.path("samples")), open_samples(scored.path("accepted"))
    with (scored.path("accepted") / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    chosen = [int(row["candidate"]) for row in rows if row["accepted_as"]]
    assert [int(row["accepted_as"]) for row in rows if row["accepted_as"]] == list(range(accepted.count))
    assert (accepted.images(0, accepted.count) == candidates.read_images(chosen)).all()
    assert (accepted.labels == candidates.labels[chosen]).all()
    for level in candidates.levels:
        assert (accepted.codes.codes[level] == candidates.codes.codes[level][chosen]).all()
    for name in candidates.classes:
        scores = {bool(row["accepted_as"]): float(row["score"]) for row in rows if row["class"] == name}
        assert scores[True] >= scores[False]


def test_accepted_samples_record_how_they_were_chosen(scored):
    """Whoever gets the folder can see that its samples were rejected, and by which critic."""
    recorded, candidates = meta(scored.path("accepted")), meta(scored.path("samples"))
    assert recorded["accepted"] == recorded["count"] / candidates["count"] and candidates["accepted"] == 1.0
    assert recorded["critic"] == digest(scored.path("classifiers") / "shards")
    assert recorded["candidates"] == digest(scored.path("samples"))
    assert (recorded["acceptance"], recorded["threshold"]) == (0.5, 0.0)


def test_curve_has_one_row_per_rate_with_rising_scores(scored):
    """Each row names its metrics' network and its number of images."""
    with (scored.files("reject_samples")[1] / "samples.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["acceptance"] for row in rows] == ["1.0", "0.5"]
    assert float(rows[0]["mean_score"]) < float(rows[1]["mean_score"])
    assert len({row["images"] for row in rows}) == 1
    assert {"kid_efficientnet_lite0", "is_efficientnet_lite0", "precision_efficientnet_lite0"} < rows[0].keys()
    sheets = {path.name for path in scored.path("accepted").glob("acceptance-*.png")}
    assert sheets == {"acceptance-1.png", "acceptance-0.5.png"}


def test_rejection_does_not_depend_on_its_parts(scored, monkeypatch):
    """Parts of another size give equal files, and so does a run that resumes after the scores."""
    monkeypatch.setattr(reject, "IMAGES_PER_PART", 3)
    monkeypatch.setattr(reject, "write_accepted", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    run_stage = partial(scored.reject, out="again", fingerprint="again")
    with pytest.raises(KeyboardInterrupt):
        run_stage()
    monkeypatch.undo()
    monkeypatch.setattr(reject, "IMAGES_PER_PART", 3)
    monkeypatch.setattr(reject.RejectionWorker, "scores", None)  # would fail if it were called again
    with without_ray():
        run_stage()
    assert digest(scored.path("again")) == digest(scored.path("accepted"))


def test_a_threshold_that_no_sample_reaches_is_refused(scored):
    """The error names the best score."""
    with pytest.raises(UserError, match=r"No sample scores 1 or more; the best scores 0\.\d+"):
        scored.reject(out="none", fingerprint="none", threshold=1.0, curve=())


def test_critic_of_other_classes_is_refused(scored, tmp_path):
    """Its probabilities would be those of other classes."""
    network = Classifier(ClassifierConfig(8, 0, 1), 3)
    other = {**meta(scored.path("classifiers") / "shards"), "classes": ["a", "b", "c"]}
    model_file.write(tmp_path / "critic", "classifier", network.state_dict(), other, history=[], images={})
    critic_artifact = artifact.read(tmp_path / "critic", "classifier")
    with pytest.raises(UserError, match="must know the 2 classes of the samples, at 16 pixels, got 3 classes"):
        reject.check_critic(open_samples(scored.path("samples")), critic_artifact)
