"""Reports of ``kvq check`` as rich tables, from plain data."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.table import Column, Table

from kvq.report.tables import new_table, number


def engines_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """One row an engine: does it load, with which cache, and how many scales were found."""

    def count(scales: Mapping[str, Any]) -> str:
        found = f"{scales['found']} of {scales['expected']}" if scales["expected"] or scales["found"] else "none"
        if scales["found"] and scales["smallest"] is not None:
            found += f", {scales['smallest']:.3g} to {scales['largest']:.3g}"
        return found

    shown = (
        (
            f"{row['engine']} {row['version']}",
            "yes" if row["passes"] else "NO",
            row["cache_dtype"] or "-",
            count(row["scales"]),
        )
        for row in rows
    )
    return new_table(title, _first("engine"), "loads", "cache", "scales", rows=shown, left=None)


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
    shown = (
        (*finding, "all" if len(names) == len(rows) > 1 else ", ".join(names))
        for finding, names in sorted(concerned.items(), key=lambda item: order.index(item[0][0]))
    )
    return new_table("Findings", _first("level"), "about", "what", "engines", rows=shown, left=None)


def expressible_table(title: str, recipes: Mapping[str, str]) -> Table:
    """Shipped recipe -> how the engine can have it, or why not; those it can have come first."""
    shown = []
    for name, text in sorted(recipes.items(), key=lambda item: (not item[1].startswith("how"), item[0])):
        verdict, _, reason = text.partition(": ")
        shown.append((name, "yes" if verdict == "how" else "no", reason))
    return new_table(title, _first("recipe"), "can be had", "how, or why not", rows=shown, left=None)


def comparison_table(found: Mapping[str, Any]) -> Group:
    """An engine's answers beside kvq's simulation, nats a token."""
    title = f"{found['engine']} {found['version']} on {found['platform']}, {found['cache_dtype']} cache"
    if found["scales_checked"]:
        title += f", {found['scales_checked']} scales as in the folder"
    texts = (row["text"] if len(row["text"]) <= 40 else f"{row['text'][:37]}..." for row in found["prompts"])
    numbers = ("deviation", "noise", "effect")
    shown = ((repr(text), *(number(row[name]) for name in numbers)) for text, row in zip(texts, found["prompts"]))
    legend = (
        "Mean difference of log-probabilities, nats a token: deviation of the engine from kvq's simulation; noise, of "
        "two simulations from each other; effect, of the engine from the model in 16 bits."
    )
    return Group(new_table(title, _first("it wrote"), *numbers, rows=shown, left=None), legend)


def _first(name: str) -> Column:
    return Column(name, no_wrap=True)
