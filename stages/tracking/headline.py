"""Headline metrics: the few numbers by which runs of the pipeline are compared, with short names.

The run of a stage in MLflow has all its metrics; the run of the pipeline has these only.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from stages.formats.flatten import flatten_numbers

# Name of a file in metrics/ and full key of a number in it -> name of the headline metric. A group is a level.
HEADLINE = {
    r"vqvae\.psnr": "psnr",
    r"vqvae\.perplexity_(\w+)": r"perplexity_\1",
    r"prior_(\w+)\.nll": r"nll_\1",
    r"evaluate\.(psnr|kid|frechet|precision|recall)": r"\1",
}


def read_headline(paths: Iterable[Path]) -> dict[str, float]:
    """Read the headline metrics from files in metrics/, as far as they exist. A later file overrides an earlier one.

    Raises ValueError if a file is not JSON, and OSError if it cannot be read.
    """
    values: dict[str, float] = {}
    for path in paths:
        if path.is_file():
            numbers = flatten_numbers(json.loads(path.read_bytes()))
            values |= headline_metrics({f"{path.stem}.{key}": number for key, number in numbers.items()})
    return values


def headline_metrics(values: Mapping[str, float]) -> dict[str, float]:
    """Select the headline metrics from numbers by file and full key, such as "evaluate.kid"."""
    return {
        match.expand(name): value
        for key, value in values.items()
        for pattern, name in HEADLINE.items()
        if (match := re.fullmatch(pattern, key))
    }
