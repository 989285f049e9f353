"""Headline metrics: the few numbers by which runs of the pipeline are compared, with short names.

The run of a stage in MLflow has all its metrics; the run of the pipeline has these only.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from stages.formats.flatten import flatten_numbers

# Name of a file in metrics/ and full key of a number in it -> name of the headline metric. LEVEL stands for any level.
HEADLINE = {
    "vqvae.perplexity_LEVEL": "perplexity_LEVEL",
    "prior_LEVEL.nll": "nll_LEVEL",
    **{f"evaluate.{name}": name for name in ("psnr", "kid", "frechet", "precision", "recall")},
}


def headline_names(levels: Iterable[str]) -> list[str]:
    """Return the names of the headline metrics of a model with these levels."""
    levels = list(levels)
    return [
        name.replace("LEVEL", level) for name in HEADLINE.values() for level in (levels if "LEVEL" in name else [""])
    ]


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
        name.replace("LEVEL", match["level"] if "LEVEL" in name else ""): value
        for key, value in values.items()
        for source, name in HEADLINE.items()
        if (match := re.fullmatch(re.escape(source).replace("LEVEL", r"(?P<level>\w+)"), key))
    }
