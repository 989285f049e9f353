"""Tests of the headline metrics."""

import json

from stages.tracking.headline import headline_metrics, headline_names, read_headline


def test_few_metrics_describe_a_pipeline_run():
    """Each is named once, with its level; other numbers are left to the runs of the stages."""
    values = {
        "shard.images": 3372.0,
        "vqvae.psnr": 26.0,
        "vqvae.perplexity_top": 52.0,
        "vqvae.perplexity_bottom": 194.0,
        "prior_top.nll": 2.0,
        "prior_top.nll_train": 1.7,
        "prior_bottom.nll": 2.4,
        "evaluate.kid": 0.1,
        "evaluate.frechet": 180.0,
        "evaluate.precision": 0.5,
        "evaluate.recall": 0.4,
        "evaluate.ssim": 0.9,
        "evaluate.psnr": 26.6,
    }
    assert headline_metrics(values) == {
        "psnr": 26.6,
        "perplexity_top": 52.0,
        "perplexity_bottom": 194.0,
        "nll_top": 2.0,
        "nll_bottom": 2.4,
        "kid": 0.1,
        "frechet": 180.0,
        "precision": 0.5,
        "recall": 0.4,
    }


def test_headline_is_read_from_the_files_that_exist(tmp_path):
    """A name has one source: the PSNR of the training, over fewer images, is not that of the evaluation."""
    for name, psnr in (("vqvae", 26.0), ("evaluate", 26.6)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"psnr": psnr, "notes": "none"}))
    assert read_headline([tmp_path / f"{name}.json" for name in ("vqvae", "prior_top")]) == {}
    assert read_headline([tmp_path / f"{name}.json" for name in ("vqvae", "prior_top", "evaluate")]) == {"psnr": 26.6}


def test_names_are_known_before_a_run():
    """Pages have columns for all of them."""
    names = headline_names(["top", "bottom"])
    assert names[:4] == ["perplexity_top", "perplexity_bottom", "nll_top", "nll_bottom"] and "recall" in names
    assert len(names) == len(set(names)) == 9
