"""Headline metrics: the few numbers by which runs of the pipeline are compared, with short names.

The run of a stage in MLflow has all its metrics; the run of the pipeline has these only.
"""

import re
from collections.abc import Mapping

# Name of a file in metrics/ and full key of a number in it -> name of the headline metric. A group is a level.
LEVEL = r"([^.]+)"
NETWORK = r"[^.]+?"  # feature network
HEADLINE = {
    r"vqvae\.validation\.psnr": "psnr",
    rf"vqvae\.validation\.perplexity_{LEVEL}": r"perplexity_\1",
    rf"prior_{LEVEL}\.validation\.nll_nats_per_code": r"nll_\1",
    r"evaluate\.reconstruction\.validation\.psnr": "psnr",
    rf"evaluate\.codebook\.{LEVEL}\.validation\.perplexity": r"perplexity_\1",
    rf"evaluate\.likelihood\.{LEVEL}\.validation\.nats_per_code": r"nll_\1",
    rf"evaluate\.compared\.samples\.kid_{NETWORK}": "kid_samples",
    rf"evaluate\.compared\.reconstructions\.kid_{NETWORK}": "kid_reconstructions",
    rf"evaluate\.compared\.samples\.precision_{NETWORK}": "precision",
    rf"evaluate\.compared\.samples\.recall_{NETWORK}": "recall",
}
STANDARD_ERROR = "_se"  # end of the key of a standard error


def headline_metrics(values: Mapping[str, float]) -> dict[str, float]:
    """Select the headline metrics from numbers by file and full key, such as "evaluate.compared.samples.images"."""
    return {
        match.expand(name): value
        for key, value in values.items()
        if not key.endswith(STANDARD_ERROR)
        for pattern, name in HEADLINE.items()
        if (match := re.fullmatch(pattern, key))
    }
