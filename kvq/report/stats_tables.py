"""Calibration statistics as tables."""

from typing import Any

from rich.table import Table

from kvq.report.tables import number, plain_table


def stats_rows(stats) -> list[dict[str, Any]]:
    """A layer a row: what each statistic says in a few numbers; None where it was not measured."""
    return [{"layer": index, **_layer_row(layer)} for index, layer in stats.layers.items()]


def _layer_row(layer) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for tensor in ("key", "key_pre", "value", "query"):
        found = layer.get(f"{tensor}.range")
        row[tensor] = found and {
            "tokens": found.count,
            "absmax": found.absmax.max().item(),
            "rms": found.rms.square().mean().sqrt().item(),
            # Of the energy of an average token, the part that is the same in all tokens.
            "mean_share": (found.mean.square().sum() / found.rms.square().sum()).item(),
        }
    sinks, massive = layer.get("sinks"), layer.get("massive")
    row["sink_share"] = sinks and sinks.share[:, 0].mean().item()
    row["massive"] = massive and {
        "peak": massive.peak,
        "median": massive.median,
        "channels": massive.channels,
        "token_share": massive.share,
    }
    return row


def stats_table(rows: list[dict[str, Any]]) -> Table:
    """Rows of ``stats_rows``."""
    columns = (
        "layer",
        "key max",
        "key rms",
        "key mean",
        "value max",
        "value rms",
        "query max",
        "first token",
        "hidden max",
    )
    table = plain_table("Keys and queries (after RoPE), values, attention and hidden states by layer", *columns)
    for row in rows:
        key, value, query = (row[name] or {} for name in ("key", "value", "query"))
        # Before RoPE, because it turns a constant key into one that changes with its position.
        mean = (row["key_pre"] or row["key"] or {}).get("mean_share")
        table.add_row(
            str(row["layer"]),
            *(number(side.get(name), 2) for side in (key,) for name in ("absmax", "rms")),
            percent(mean),
            *(number(value.get(name), 2) for name in ("absmax", "rms")),
            number(query.get("absmax"), 2),
            percent(row["sink_share"]),
            number(row["massive"] and row["massive"]["peak"], 0),
        )
    return table


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"
