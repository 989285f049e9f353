"""Tests of the headline metrics."""

from stages.tracking.headline import headline_metrics


def test_few_metrics_describe_a_pipeline_run():
    """Of a full evaluation of two levels, nine numbers remain, with one short name for each level."""
    values = {"evaluate.reconstruction.validation.psnr": 26.6, "evaluate.reconstruction.train.psnr": 27.0}
    values |= {
        f"evaluate.{key}": 1.0
        for level in ("top", "bottom")
        for key in (f"codebook.{level}.validation.perplexity", f"likelihood.{level}.validation.nats_per_code")
    }
    values |= {
        f"evaluate.compared.{image_set}.{metric}_efficientnet_lite0{end}": 0.5
        for image_set in ("samples", "reconstructions")
        for metric in ("kid", "precision", "recall")
        for end in ("", "_se")
    }
    assert headline_metrics(values) == {
        "psnr": 26.6,
        **dict.fromkeys(("perplexity_top", "perplexity_bottom", "nll_top", "nll_bottom"), 1.0),
        **dict.fromkeys(("kid_samples", "kid_reconstructions", "precision", "recall"), 0.5),
    }


def test_training_has_headline_metrics_before_evaluation():
    """Names are the same as those of the evaluation, and other numbers are ignored."""
    values = {
        "vqvae.validation.psnr": 26.0,
        "vqvae.validation.perplexity_top": 50.0,
        "vqvae.train.psnr": 27.0,
        "prior_top.validation.nll_nats_per_code": 2.0,
        "shard.images.train": 90.0,
    }
    assert headline_metrics(values) == {"psnr": 26.0, "perplexity_top": 50.0, "nll_top": 2.0}
