"""Tables and charts of ablations, as an offline HTML page and as Markdown."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline import params
from pipeline.ablation_results import Result
from pipeline.ablations import Ablation, Experiment
from stages.evaluation import svg
from stages.formats import html_page
from stages.tracking.quantities import format_duration, format_number

TEMPLATE = Path(__file__).with_name("ablation_page.html.j2")
MISSING = "-"
LABELS = {
    "mse": "MSE of pixels in [-1, 1]",
    "sharpness": "sharpness",
    "kid": "KID of samples",
    "bits_per_pixel": "bits per pixel of the codes",
}
CAPTION = (
    "Validation images; one seed. NLL in nats per code. Bits per pixel: the codes of all levels under their priors. "
    "MSE of pixels in [-1, 1]. Sharpness: gradient energy of the reconstructions divided by that of their images. KID "
    "of the samples. Parameters and training FLOP of all networks that the variant trains. Time of the experiment on "
    "this machine; none if trained networks came from the cache."
)


@dataclass(frozen=True)
class Row:
    """Variant of an ablation and its numbers; None if it has not run."""

    experiment: Experiment
    result: Result | None


@dataclass(frozen=True)
class Section:
    """Ablation, its rows as text, and its chart."""

    name: str
    claim: str
    header: Sequence[str]
    cells: Sequence[Sequence[str]]
    changes: Sequence[str]  # of each row
    chart: str  # SVG; "" if no variant has the number


def sections(ablations: Mapping[str, Ablation], rows: Sequence[Row]) -> list[Section]:
    """Arrange the rows of each ablation."""
    return [
        _section(name, ablation, [row for row in rows if row.experiment.ablation == name])
        for name, ablation in ablations.items()
    ]


def _section(name: str, ablation: Ablation, rows: Sequence[Row]) -> Section:
    levels = list(dict.fromkeys(level for row in rows for level in row.experiment.settings.vqvae.levels))
    header = ["KID", "Fréchet distance", "precision", "recall", "time"]
    if not ablation.is_of_sampling:
        header = [*(f"NLL {level}" for level in levels), "bits/pixel", "MSE", "sharpness", "KID", "parameters"]
        header += ["training TFLOP", "time"]
    return Section(
        name,
        ablation.claim,
        ["variant", *header],
        [[row.experiment.variant, *_cells(row.result, levels, ablation, len(header))] for row in rows],
        [", ".join(row.experiment.changes) or "the base settings" for row in rows],
        _chart(name, ablation, rows),
    )


def _cells(result: Result | None, levels: Sequence[str], ablation: Ablation, columns: int) -> Iterator[str]:
    if result is None:
        yield from [MISSING] * columns
        return
    if ablation.is_of_sampling:
        for value in (result.kid, result.frechet, result.precision, result.recall):
            yield _number(value, 3)
    else:
        for level in levels:
            yield _number(result.nll.get(level, math.nan), 4)
        yield _number(result.bits_per_pixel, 4)
        yield _number(result.mse, 3)
        yield _number(result.sharpness, 3)
        yield _number(result.kid, 3)
        yield f"{result.parameters:,}"
        yield _number(result.training_flops / 1e12, 3)
    yield MISSING if math.isnan(result.seconds) else format_duration(result.seconds)


def _number(value: float, digits: int) -> str:
    return MISSING if math.isnan(value) else format_number(value, digits)


def _chart(name: str, ablation: Ablation, rows: Sequence[Row]) -> str:
    """Draw one point per variant: the number `y` of the ablation by training FLOP, or by its setting `x`."""
    points = {
        row.experiment.variant: ([_x(ablation, row.experiment, row.result)], [row.result.number(ablation.y)])
        for row in rows
        if row.result is not None and not math.isnan(row.result.number(ablation.y))
    }
    if not points:
        return ""
    label = LABELS.get(ablation.y, ablation.y.replace("_", " "))
    return svg.line_chart(name, f"{name}: {label}", points, x_label=ablation.x or "training TFLOP", y_label=label)


def _x(ablation: Ablation, experiment: Experiment, result: Result) -> float:
    if not ablation.x:
        return result.training_flops / 1e12
    return float(params.look_up(asdict(experiment.settings), ablation.x))


def render(all_sections: Sequence[Section], base: str) -> str:
    """Render the page as HTML."""
    return html_page.render(TEMPLATE, sections=all_sections, base=base, caption=CAPTION)


def to_markdown(all_sections: Sequence[Section], base: str) -> str:
    """Format the tables as Markdown."""
    lines = [f"Base settings: {base}. {CAPTION}", ""]
    for section in all_sections:
        lines += [f"## {section.name}", "", section.claim, ""]
        lines += [_markdown_row(section.header), _markdown_row(["---", *["---:"] * (len(section.header) - 1)])]
        lines += [*map(_markdown_row, section.cells), ""]
    return "\n".join(lines)


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
