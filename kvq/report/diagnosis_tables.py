"""A diagnosis as tables."""

import math
from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.table import Table

from kvq.pages.layout import SIDES
from kvq.report.tables import new_table, number


def verdict_lines(diagnosis: Mapping[str, Any]) -> list[str]:
    """The verdict and each cause as a line, from ``Diagnosis.to_dict``."""
    return [f"Verdict: {diagnosis['verdict']}"] + [cause_line(cause) for cause in diagnosis["causes"]]


def cause_line(cause: Mapping[str, Any]) -> str:
    return f"Cause: {cause['text']}. Advice: {cause['advice']}."


def predictions_table(diagnosis: Mapping[str, Any]) -> Group:
    rows = []
    for row in diagnosis["predictions"]:
        if not row["why_not"]:
            worst = max(row["errors"], key=row["errors"].get)
            where = f"{worst} ({percent(row['errors'][worst])})"
            rows.append((row["recipe"], number(row["bits_per_element"], 2), loss(row["loss"]), where, row["verdict"]))
    columns = ("recipe", "bits", "loss, nats per token", "worst layer", "verdict")
    table = new_table("Predicted before anything is quantized", *columns, rows=rows)
    how = "tokens of the text" if diagnosis["tokens"] == "real" else "tokens drawn by the measured distributions"
    note = (
        f"Tried on {how}; in brackets the relative error of the worst layer's attention. Predictions tell ruin from "
        "harm and harm from nothing; 'kvq eval' measures."
    )
    return Group(table, note, *not_predicted(diagnosis))


def not_predicted(diagnosis: Mapping[str, Any]) -> list[str]:
    """A line for each reason."""
    reasons: dict[str, list[str]] = {}
    for row in diagnosis["predictions"]:
        if row["why_not"]:
            reasons.setdefault(row["why_not"], []).append(row["recipe"])
    return [f"Not predicted: {', '.join(names)}, because {why}" for why, names in reasons.items()]


def bit_errors_table(errors: Mapping[int, Mapping[str, Mapping[int, float]]], recipe: str) -> Table:
    """Relative errors of attention by layer, side and bit width."""
    title = f"Relative error of attention with keys or values alone at so many bits ({recipe})"
    names, rows = bit_error_rows(errors)
    return new_table(title, "layer", *names, rows=((str(index), *cells) for index, cells in rows))


def bit_error_rows(errors: Mapping[int, Mapping[str, Mapping[int, float]]]) -> tuple[list[str], list[tuple[int, list]]]:
    """Names of the columns, and the cells of each layer."""
    columns = [(side, width) for side in SIDES for width in next(iter(errors.values()))[side]]
    names = [f"{side[0].upper()} {width}" for side, width in columns]
    return names, [(index, [percent(own[side][width]) for side, width in columns]) for index, own in errors.items()]


def percent(square: float) -> str:
    """A squared relative error as a relative error."""
    return f"{math.sqrt(square):.1%}" if square < 1e2 else f"{math.sqrt(square):.0f}x"


def loss(nats: float) -> str:
    return f"{nats:.4f}" if nats < 10 else "over 10"
