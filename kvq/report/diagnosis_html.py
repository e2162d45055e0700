"""A diagnosis as one HTML file that needs nothing beside it: drawings are inside."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from kvq.report.diagnosis_tables import bit_error_rows, loss, not_predicted, verdict_lines
from kvq.report.drawing import svg
from kvq.report.page import render

TITLES = {
    "losses": "Recipes",
    "bits": "Error of each layer at each bit width",
    "channels-key": "Keys",
    "channels-value": "Values",
    "tokens": "Tokens of single layers",
    "sinks": "Attention sinks",
    "massive": "Massive activations",
}


def diagnosis_html(
    title: str, facts: Mapping[str, Any], diagnosis: Mapping[str, Any], bit_errors: Mapping, bit_recipe: str,
    figures: Mapping[str, Figure],
) -> str:  # fmt: skip
    """The whole page.

    facts        shown as a table.  diagnosis  ``Diagnosis.to_dict()``.
    bit_errors   ``kvq.diagnosis.bit_errors``, of the recipe named.
    figures      by name (``diagnosis_charts``).
    """
    widths, errors = bit_error_rows(bit_errors)
    tried = [row for row in diagnosis["predictions"] if not row["why_not"]]
    return render(
        "diagnosis.html.j2",
        brand="kvq diagnosis",
        title=title,
        verdict=verdict_lines(diagnosis),
        facts=facts,
        predictions=[
            {
                "recipe": row["recipe"],
                "bits": f"{row['bits_per_element']:.2f}",
                "loss": loss(row["loss"]),
                "verdict": row["verdict"],
            }
            for row in tried
        ],
        notes=not_predicted(diagnosis),
        charts=_by_heading(figures),
        bit_recipe=bit_recipe,
        widths=widths,
        bit_errors=errors,
    )


def _by_heading(figures: Mapping[str, Figure]) -> list[tuple[str, list[Markup]]]:
    """Drawings under the headings of ``TITLES``."""
    found: dict[str, list[Markup]] = {}
    for name, figure in figures.items():
        heading = next(text for start, text in TITLES.items() if name.startswith(start))
        found.setdefault(heading, []).append(svg(figure, f"{figure.get_suptitle()} ({name})"))
    return list(found.items())
