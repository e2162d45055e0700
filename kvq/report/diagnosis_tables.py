"""A diagnosis as tables."""

import math
from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.table import Table

from kvq.report.tables import number, plain_table


def verdict_lines(diagnosis: Mapping[str, Any]) -> list[str]:
    """The verdict and each cause as a line, from ``Diagnosis.to_dict``."""
    return [f"Verdict: {diagnosis['verdict']}"] + [cause_line(cause) for cause in diagnosis["causes"]]


def cause_line(cause: Mapping[str, Any]) -> str:
    return f"Cause: {cause['text']}. Advice: {cause['advice']}."


def predictions_table(diagnosis: Mapping[str, Any]) -> Group:
    table = plain_table(
        "Predicted before anything is quantized", "recipe", "bits", "loss, nats per token", "worst layer", "verdict"
    )
    for row in diagnosis["predictions"]:
        if row["why_not"]:
            continue
        errors = row["errors"]
        worst = max(errors, key=errors.get)
        table.add_row(
            row["recipe"],
            number(row["bits_per_element"], 2),
            loss(row["loss"]),
            f"{worst} ({percent(errors[worst])})",
            row["verdict"],
        )
    how = "tokens of the text" if diagnosis["tokens"] == "real" else "tokens drawn by the measured distributions"
    notes = [
        f"Tried on {how}; in brackets the relative error of the worst layer's attention. Predictions tell ruin from "
        "harm and harm from nothing; 'kvq eval' measures."
    ]
    return Group(table, *notes, *not_predicted(diagnosis))


def not_predicted(diagnosis: Mapping[str, Any]) -> list[str]:
    """A line for each reason."""
    reasons: dict[str, list[str]] = {}
    for row in diagnosis["predictions"]:
        if row["why_not"]:
            reasons.setdefault(row["why_not"], []).append(row["recipe"])
    return [f"Not predicted: {', '.join(names)}, because {why}" for why, names in reasons.items()]


def bit_errors_table(errors: Mapping[int, Mapping[str, Mapping[int, float]]], recipe: str) -> Table:
    """Relative errors of attention by layer, side and bit width."""
    widths = list(next(iter(errors.values()))["key"])
    names = [f"{side} {width}" for side in ("K", "V") for width in widths]
    table = plain_table(
        f"Relative error of attention with keys or values alone at so many bits ({recipe})", "layer", *names
    )
    for index, sides in errors.items():
        table.add_row(str(index), *(percent(sides[side][width]) for side in ("key", "value") for width in widths))
    return table


def percent(square: float) -> str:
    """A squared relative error as a relative error."""
    return f"{math.sqrt(square):.1%}" if square < 1e2 else f"{math.sqrt(square):.0f}x"


def loss(nats: float) -> str:
    return f"{nats:.4f}" if nats < 10 else "over 10"
