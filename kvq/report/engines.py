"""Reports of ``kvq check`` as rich tables, from plain data."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table


def engines_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """One row an engine: does it load, with which cache, and how many scales were found."""
    table = _table(title, "engine", "loads", "cache", "scales")
    for row in rows:
        scales = row["scales"]
        count = f"{scales['found']} of {scales['expected']}" if scales["expected"] or scales["found"] else "none"
        if scales["found"] and scales["smallest"] is not None:
            count += f", {scales['smallest']:.3g} to {scales['largest']:.3g}"
        table.add_row(
            f"{row['engine']} {row['version']}",
            "yes" if row["passes"] else "NO",
            row["cache_dtype"] or "-",
            count,
        )
    return table


def serve_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The commands that serve the folder, one a line, so that they can be copied."""
    return [f"{row['engine']} {row['version']}: {row['serve']}" for row in rows if row["serve"]]


def findings_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Every finding once, errors first, with the engines that it concerns."""
    concerned: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        for finding in row["findings"]:
            key = (finding["level"], finding["about"], finding["text"])
            concerned.setdefault(key, []).append(row["engine"])
    order = ("error", "warning", "note")
    table = _table("Findings", "level", "about", "what", "engines")
    for (level, about, text), names in sorted(concerned.items(), key=lambda item: order.index(item[0][0])):
        table.add_row(level, about, text, "all" if len(names) == len(rows) > 1 else ", ".join(names))
    return table


def expressible_table(title: str, recipes: Mapping[str, str]) -> Table:
    """Shipped recipe -> how the engine can have it, or why not; those it can have come first."""
    table = _table(title, "recipe", "can be had", "how, or why not")
    for name, text in sorted(recipes.items(), key=lambda item: (not item[1].startswith("how"), item[0])):
        verdict, _, reason = text.partition(": ")
        table.add_row(name, "yes" if verdict == "how" else "no", reason)
    return table


def comparison_table(found: Mapping[str, Any]) -> Group:
    """An engine's answers beside kvq's simulation, nats a token."""
    title = f"{found['engine']} {found['version']} on {found['platform']}, {found['cache_dtype']} cache"
    if found["scales_checked"]:
        title += f", {found['scales_checked']} scales as in the folder"
    table = _table(title, "it wrote", "deviation", "noise", "effect")
    for row in found["prompts"]:
        text = row["text"] if len(row["text"]) <= 40 else f"{row['text'][:37]}..."
        table.add_row(repr(text), f"{row['deviation']:.4f}", f"{row['noise']:.4f}", f"{row['effect']:.4f}")
    legend = (
        "Mean difference of log-probabilities, nats a token: deviation of the engine from kvq's simulation; noise, of "
        "two simulations from each other; effect, of the engine from the model in 16 bits."
    )
    return Group(table, legend)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, no_wrap=i == 0, overflow="fold")
    return table
