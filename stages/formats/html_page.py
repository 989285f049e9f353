"""Pages that open without a network: HTML from a template, with the style that all pages share (page.css)."""

from pathlib import Path
from typing import Any

import jinja2

PROVENANCE_SCRIPT = "provenance.js"  # facts of a run, in its work folder; the report loads it if it exists


def render(template: Path, **values: Any) -> str:
    """Render a template with values, which are escaped. The template includes page.css in its own style."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(**values)
