"""Report of a VQ-VAE that does not quantize: its reconstructions and training curves, on one page.

Such a VQ-VAE has no codes, so there are no priors, no samples and no evaluation of them.
"""

import base64
from pathlib import Path

from stages.formats import artifact, curves, html_page
from stages.tracking.quantities import format_number

VQVAE = Path("artifacts/vqvae")
PAGE = Path("runs/reconstructions/report.html")
TEMPLATE = Path(__file__).with_name("reconstruction_page.html.j2")
SHEET = "reconstructions.png"
SPLITS = {"train": "training, augmented", "validation": "validation"}
METRICS = {"psnr": "PSNR, dB", "mse": "MSE of pixels in [-1, 1]"}
NOTICE = (
    "note: vqvae.quantizer.mode is none, so there are no codes, priors and samples: this run ends after the VQ-VAE "
    "with a report of its reconstructions."
)


def write(vqvae: Path = VQVAE, page: Path = PAGE) -> Path:
    """Write the report of a trained VQ-VAE; return its path. Raises UserError if the VQ-VAE is missing or damaged."""
    model = artifact.read(vqvae, "vqvae", "vqvae")
    model.verify()
    page.parent.mkdir(parents=True, exist_ok=True)
    with artifact.atomic_write(page) as temporary:
        temporary.write_text(_render(model), encoding="utf-8")
    return page


def _render(model: artifact.Artifact) -> str:
    points = curves.read(model.path(curves.FILE))
    rows = [{"step": step, "name": name, "value": value} for step, name, value in points]
    values = curves.last(rows)
    table = [
        (label, *(format_number(values[split][metric]) for metric in METRICS))
        for split, label in SPLITS.items()
        if split in values
    ]
    charts = [(label, _chart(rows, metric, label)) for metric, label in METRICS.items()]
    grids = ", ".join(f"{name} {side} x {side}" for name, side in model.meta["grids"].items())
    return html_page.render(
        TEMPLATE,
        image_size=model.meta["image_size"],
        grids=grids,
        header=["images", *METRICS.values()],
        table=table,
        charts=charts,
        sheet=base64.b64encode(model.path(SHEET).read_bytes()).decode(),
        digest=model.digest,
    )


def _chart(rows: curves.Rows, metric: str, label: str) -> str:
    from stages.evaluation import svg  # imports matplotlib

    lines: dict[str, tuple[list[float], list[float]]] = {}
    for step, split, value in curves.curve_points(rows, [metric]):
        x, y = lines.setdefault(SPLITS.get(split, split), ([], []))
        x.append(step)
        y.append(value)
    return svg.line_chart(metric, label, lines, x_label="step", y_label=label)
