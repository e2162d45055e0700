"""A diagnosis as one HTML file that needs nothing beside it: pictures are inside."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from kvq.report.diagnosis_tables import loss, not_predicted, percent, verdict_lines

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1150px; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; }
td, th { padding: .15rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
td:first-child, th:first-child { text-align: left; }
img { max-width: 100%; margin: .5rem 0; }
.verdict { background: #f3f3f3; border-left: 4px solid #888; padding: .6rem 1rem; }
.good { color: #187a2f; } .lossy { color: #b36b00; } .collapse { color: #b3001b; font-weight: bold; }
"""
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
    bit_errors   ``kvq.calib.diagnosis.bit_errors``, of the recipe named.
    pictures     PNG bytes by file name.
    """
    widths = list(next(iter(bit_errors.values()))["key"])
    body = [
        f"<h1>{escape(title)}</h1>",
        '<div class="verdict">' + "".join(f"<p>{escape(line)}</p>" for line in verdict_lines(diagnosis)) + "</div>",
        _table((), [[name, str(value)] for name, value in facts.items()]),
        _predictions(diagnosis),
    ]
    seen = set()
    for name, data in pictures.items():
        heading = next((text for start, text in TITLES.items() if name.startswith(start)), "")
        if heading and heading not in seen:
            body.append(f"<h2>{escape(heading)}</h2>")
            seen.add(heading)
        code = base64.b64encode(data).decode()
        body.append(f'<img alt="{escape(name)}" src="data:image/png;base64,{code}">')
    head = ["layer", *(f"{side} {width}" for side in ("K", "V") for width in widths)]
    rows = [
        [str(index), *(percent(sides[side][width]) for side in ("key", "value") for width in widths)]
        for index, sides in bit_errors.items()
    ]
    body += [f"<h2>Relative errors of attention ({escape(bit_recipe)} at other widths)</h2>", _table(head, rows)]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _predictions(diagnosis: Mapping[str, Any]) -> str:
    tried = [row for row in diagnosis["predictions"] if not row["why_not"]]
    rows = [[row["recipe"], f"{row['bits_per_element']:.2f}", loss(row["loss"]), row["verdict"]] for row in tried]
    notes = "".join(f"<p>{escape(line)}</p>" for line in not_predicted(diagnosis))
    return _table(["recipe", "bits", "predicted loss, nats per token", "verdict"], rows) + notes


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"] if head else []
    for row in rows:
        marked = f' class="{row[-1]}"' if row[-1] in ("good", "lossy", "collapse") else ""
        lines.append(f"<tr{marked}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>")
    return "<table>" + "".join(lines) + "</table>"
