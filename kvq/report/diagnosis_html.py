"""A diagnosis as one HTML file that needs nothing beside it: pictures are inside."""

from collections.abc import Mapping
from typing import Any

from kvq.report.diagnosis_tables import loss, not_predicted, percent, verdict_lines
from kvq.report.page import embedded, render

TITLES = {
    "losses.png": "Recipes",
    "bits.png": "Error of each layer at each bit width",
    "channels-key": "Keys",
    "channels-value": "Values",
    "tokens": "Tokens of single layers",
    "sinks.png": "Attention sinks",
    "massive.png": "Massive activations",
}


def diagnosis_html(
    title: str, facts: Mapping[str, Any], diagnosis: Mapping[str, Any], bit_errors: Mapping, bit_recipe: str,
    pictures: Mapping[str, bytes],
) -> str:  # fmt: skip
    """The whole page.

    facts        shown as a table.  diagnosis  ``Diagnosis.to_dict()``.
    bit_errors   ``kvq.diagnosis.bit_errors``, of the recipe named.
    pictures     PNG bytes by file name.
    """
    widths = list(next(iter(bit_errors.values()))["key"])
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
        pictures=_by_heading(pictures),
        bit_recipe=bit_recipe,
        widths=[f"{side} {width}" for side in ("K", "V") for width in widths],
        bit_errors=[
            (index, [percent(sides[side][width]) for side in ("key", "value") for width in widths])
            for index, sides in bit_errors.items()
        ],
    )


def _by_heading(pictures: Mapping[str, bytes]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Names and contents of pictures under the headings of ``TITLES``."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name, data in pictures.items():
        heading = next(text for start, text in TITLES.items() if name.startswith(start))
        found.setdefault(heading, []).append((name, embedded(data)))
    return list(found.items())
