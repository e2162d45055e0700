"""The result of a search as a rich table."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from kvq.report.tables import number, plain_table


def search_table(found: Mapping[str, Any]) -> Table:
    """The chosen recipes of a search and the best uniform ones: what was measured, beside what was predicted."""
    table = plain_table("Search: measured on text that sensitivities did not see", "recipe", "bits", "KL", "±", "top-1")
    table.add_column("KL confirmed", justify="right")
    table.add_column("predicted", justify="right", style="dim")
    for row in sorted([*found["points"], *found["uniform"]], key=lambda row: (row["budget"], row["measured"]["kl"])):
        measured, confirmed = row["measured"], row.get("confirmed")
        table.add_row(
            row["name"],
            number(row["bits"], 3),
            number(measured["kl"], 5),
            number(measured["kl_stderr"], 5),
            number(measured["top1"]),
            number(confirmed["kl"], 5) if confirmed else "-",
            number(row["predicted"], 5),
        )
    return table
