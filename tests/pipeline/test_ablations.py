"""Tests of the ablations of conf/ablations.yaml, of their numbers and of their page."""

import math
from contextlib import chdir
from pathlib import Path

import pytest
import torch

from pipeline import ablation_page, ablation_results, ablations, frozen_stage
from pipeline.ablation_page import Row
from pipeline.ablation_results import Result, gradient_energy, reconstruction_mse, reconstruction_sharpness
from pipeline.ablations import Ablation, Variant
from pipeline.code_rate import fixed_bits
from pipeline.commands.ablate import format_plan
from stages.config import EvaluateConfig
from stages.errors import UserError

ROOT = Path(__file__).parents[2]
SMOKE = ["experiment=smoke"]


@pytest.fixture(autouse=True)
def project_folder():
    """The project as the current folder."""
    with chdir(ROOT):
        yield


def experiments(variants: dict[str, Variant], steps: int | None = None):
    return list(ablations.experiments({"test": Ablation("A claim.", "mse", variants)}, SMOKE, steps))


def test_every_ablation_composes():
    """Each variant of the file has valid settings; variants without changes are one experiment of one name."""
    chosen = ablations.read()
    planned = list(ablations.experiments(chosen, SMOKE))
    assert [experiment.ablation for experiment in planned] == [
        name for name, ablation in chosen.items() for _ in ablation.variants
    ]
    without_changes = {experiment.name for experiment in planned if not experiment.changes}
    assert len(without_changes) == 1 and without_changes.pop().startswith("base-")


@pytest.mark.parametrize(
    ("base", "temperature"), [(["experiment=emoji32"], 0.8), ([*SMOKE, "+sample.level_rules.top.temperature=0.7"], 0.7)]
)
def test_sampling_rule_of_a_deleted_level_is_deleted(base: list[str], temperature: float):
    """The bottom level, now the coarsest, has the rule in its place."""
    both, bottom = ablations.experiments(ablations.select(["levels"], ablations.read()), base)
    assert list(both.settings.sample.level_rules) == ["top"] and list(bottom.settings.vqvae.levels) == ["bottom"]
    rules = bottom.settings.sample.level_rules
    assert {level: rule.temperature for level, rule in rules.items()} == {"bottom": temperature}


def test_bottom_level_alone_has_the_bits_of_both():
    """Two levels of 16 and 64 codes at 5 bits are 400 bits; 64 codes need 6.25 bits, 76 entries."""
    bottom, both = experiments({"one": ablations.read()["levels"].variants["bottom-only"], "two": Variant()})
    assert list(bottom.settings.vqvae.levels) == list(bottom.settings.priors) == ["bottom"]
    assert fixed_bits(both.settings) == 400
    assert fixed_bits(bottom.settings) == pytest.approx(400, abs=1)


def test_batch_sizes_train_on_equally_many_images():
    """Steps shrink as batches grow, and the name of each experiment differs."""
    planned = list(ablations.experiments(ablations.select(["batch"], ablations.read()), SMOKE))
    trains = [experiment.settings.priors["top"].train for experiment in planned]
    assert [(train.batch_size, train.steps) for train in trains] == [(8, 16), (16, 8), (32, 4)]
    assert len({experiment.name for experiment in planned}) == 3


def test_budget_of_steps_replaces_all_trainings():
    """Every network trains for this many steps, with a warm-up that is shorter."""
    (experiment,) = experiments({"base": Variant()}, steps=5)
    settings = experiment.settings
    trains = [settings.train_vqvae, *(prior.train for prior in settings.priors.values())]
    assert {(train.steps, train.warmup_steps) for train in trains} == {(5, 0)}


def test_budget_of_steps_replaces_those_of_classifiers():
    """They are trainings too."""
    base = [*SMOKE, "+critic=smoke"]
    (experiment,) = ablations.experiments({"test": Ablation("A claim.", "mse", {"base": Variant()})}, base, 5)
    trains = [classifier.train for classifier in experiment.settings.classifiers.values()]
    assert {(train.steps, train.warmup_steps) for train in trains} == {(5, 0)}


def test_changes_of_a_frozen_stage_are_refused(tmp_path: Path):
    """DVC would not train the imported VQ-VAE again; variants of other stages are left."""
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    line = f"  {frozen_stage.STAGE}:\n"
    text = (ROOT / "dvc.yaml").read_text().replace(line, line + frozen_stage.FROZEN_LINE)
    (tmp_path / "dvc.yaml").write_text(text)
    with chdir(tmp_path):
        assert experiments({"tanh": Variant(("priors.top.network.gate=tanh",))})
        with pytest.raises(UserError, match=r"test\.variants\.loss changes vqvae, settings of the stage vqvae"):
            experiments({"loss": Variant(("vqvae.quantizer.mode=loss",))})
        variants = {"loss": Variant(("vqvae.quantizer.mode=loss",)), "base": Variant()}
        errors: list[UserError] = []
        chosen = {"test": Ablation("A claim.", "mse", variants)}
        (planned,) = ablations.experiments(chosen, SMOKE, leave_out=errors.append)
        assert planned.variant == "base" and "test.variants.loss changes vqvae" in errors[0].what


def test_variant_may_end_after_a_stage():
    """Only that stage and its dependencies run, so the settings of later ones do not change the experiment."""
    (experiment,) = experiments({"none": Variant(("vqvae.quantizer.mode=none",), last_stage="vqvae")})
    assert list(experiment.stages) == ["shard", "vqvae"] and experiment.last_stage == "vqvae"


def test_unknown_names_are_refused():
    """The errors name the file and what it has."""
    with pytest.raises(UserError, match="levels, quantizer"):
        ablations.select(["level"], ablations.read())
    with pytest.raises(UserError, match="matches no setting"):
        experiments({"wide": Variant(scale={"vqvae.levels.*.width": 2})})


def test_settings_that_are_no_integers_are_not_scaled():
    """Rounding would leave a dropout of 0.1 as it is, and the variant would be the base."""
    with pytest.raises(UserError, match=r"must match integers.* priors\.top\.network\.dropout is 0\.1"):
        experiments({"more-dropout": Variant(scale={"priors.top.network.dropout": 2})})


def test_invalid_file_is_refused(tmp_path: Path):
    """A misspelt key is named with its place."""
    (tmp_path / "ablations.yaml").write_text("a: {claim: b, y: mse, variants: {c: {override: []}}}")
    with pytest.raises(UserError, match=r"a\.variants\.c\.override is not valid"):
        ablations.read(tmp_path / "ablations.yaml")


def test_project_without_the_file_has_the_ablations_of_the_package(tmp_path: Path):
    """A project outside of the repository need not copy them."""
    assert ablations.read(tmp_path / "ablations.yaml") == ablations.read()


def test_dry_run_lists_experiments_and_their_state():
    """A finished experiment is listed with its commit."""
    planned = experiments({"base": Variant(), "loss": Variant(("vqvae.quantizer.mode=loss",))})
    commits = {planned[0].name: "abcdef0123456789", planned[1].name: ""}
    text = format_plan(planned, commits)
    assert "finished abcdef0" in text and "vqvae.quantizer.mode=loss" in text
    assert text.endswith("2 experiments, of which 1 are finished.")


def test_page_and_tables_have_the_numbers():
    """A variant that has not run has dashes; the chart has a point per finished variant."""
    base, loss = experiments({"base": Variant(), "loss": Variant(("vqvae.quantizer.mode=loss",))})
    result = Result(1234, 2 * 10**12, {"top": 1.5, "bottom": 2.5}, 0.75, 0.01, 0.9, math.nan, 61.0)
    chosen = {"test": Ablation("A claim.", "nll_top", {})}
    (section,) = ablation_page.sections(chosen, [Row(base, result), Row(loss, None)])
    assert section.cells[0] == ["base", "1.5", "2.5", "0.75", "0.01", "0.9", "-", "1,234", "2", "1 min 1 s"]
    assert set(section.cells[1][1:]) == {"-"} and len(section.cells[1]) == len(section.header)
    assert "| base | 1.5 |" in ablation_page.to_markdown([section], "smoke")
    page = ablation_page.render([section], "experiment=smoke")
    assert "<svg" in page and "vqvae.quantizer.mode=loss" in page


def test_curve_over_a_sampling_setting_has_numbers_of_samples():
    """Its networks are those of the base, so the table has no others; the chart is over the setting."""
    chosen = ablations.select(["temperature"], ablations.read())
    planned = list(ablations.experiments(chosen, SMOKE))
    result = Result(1, 1, {}, 1.0, 0.01, 0.9, 0.2, math.nan, 150.0, 0.4, 0.03)
    (section,) = ablation_page.sections(chosen, [Row(planned[0], result), *(Row(other, None) for other in planned[1:])])
    demo = next(iter(ablations.experiments(chosen, []))).settings.sample
    assert demo.temperature == 1.0 and not demo.level_rules  # rules of levels would hide the temperature
    assert list(section.header) == ["variant", "KID", "Fréchet distance", "precision", "recall", "time"]
    assert section.cells[0] == ["t-1.0", "0.2", "150", "0.4", "0.03", "-"] and section.cells[1][1:] == ["-"] * 5
    assert "sample.temperature" in section.chart


def test_level_is_deleted_with_the_settings_of_a_preset():
    """The preset of the documented table sets steps of the prior that the variant without a top level deletes."""
    chosen = {"levels": ablations.read()["levels"]}
    bottom = list(ablations.experiments(chosen, ["experiment=ablation16"]))[1]
    assert list(bottom.settings.priors) == ["bottom"]


def test_distortion_is_of_one_source():
    """Variants with and without an evaluation are comparable; an imported VQ-VAE has no metrics of a training."""
    trained = {"vqvae": {"psnr": 20.0}}
    assert reconstruction_mse(trained) == reconstruction_mse(trained | {"evaluate": {"psnr": 30.0}})
    assert reconstruction_mse({"vqvae": {}, "evaluate": {"psnr": 20.0}}) == reconstruction_mse(trained)
    assert math.isnan(reconstruction_mse({"vqvae": {}}))


def test_sharpness_that_is_not_measured_is_measured_later(tmp_path: Path):
    """Without the files in DVC's cache it is NaN, which is not written; the time of the experiment stays."""
    (experiment,) = experiments({"none": Variant(("vqvae.quantizer.mode=none",), last_stage="vqvae")})
    with chdir(tmp_path):
        ablation_results.write_measurements(experiment.name, {"seconds": 2.0, "sharpness": math.nan})
        result = ablation_results.read(experiment, "0" * 40)
        assert math.isnan(result.sharpness) and math.isnan(result.mse)
        assert ablation_results.read_measurements(experiment.name) == {"seconds": 2.0}


def test_gradient_energy_of_a_step():
    """A step of 2 along one axis of a 3 x 2 image has the energy 4 per row and colour; a flat image has none."""
    images = torch.zeros(1, 3, 3, 2)
    assert gradient_energy(images) == 0
    images[..., 1] = 2
    assert gradient_energy(images) == 4 * 3 * 3


def test_reconstructions_of_a_small_model_are_blurred(finished_pipeline):
    """The sharpness is that of the validation images, between 0 and 1 for a model that has trained for a few steps."""
    paths = finished_pipeline.path("shards"), finished_pipeline.path("vqvae")
    assert 0 < reconstruction_sharpness(*paths, EvaluateConfig()) < 1
