"""What learned transforms learned, as tables: the loss curve of each, before and after."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich.table import Table

from kvq.report.tables import plain_table, size

# Points of a loss curve that a table shows.
POINTS = 5


def curve(facts: Mapping[str, Any]) -> list[tuple[int, float]]:
    """(steps done, loss) of a fit of ``kvq.calib.stats``.

    Layer by layer: the mean over layers of the relative error of the attention output on windows that were not trained
    on. End to end: the mean divergence in nats a token over a fifth of the steps each, as they were trained.
    """
    if "layers" in facts:
        trials = [layer["trials"] for layer in facts["layers"].values()]
        return [(column[0][0], sum(error for _, error in column) / len(column)) for column in zip(*trials)]
    losses = facts["losses"]
    width = max(1, len(losses) // POINTS)
    parts = [losses[start : start + width] for start in range(0, len(losses) - width + 1, width)]
    return [(width * (i + 1), sum(part) / len(part)) for i, part in enumerate(parts)]


def kept(facts: Mapping[str, Any]) -> tuple[float, float] | None:
    """Mean over layers of the error before learning, and of the best step's, which is the one that is kept; None if it
    was learned end to end, where the last step is."""
    if "layers" not in facts:
        return None
    trials = [[error for _, error in layer["trials"]] for layer in facts["layers"].values()]
    return sum(t[0] for t in trials) / len(trials), sum(min(t) for t in trials) / len(trials)


def learned_table(fits: Iterable[Mapping[str, Any]]) -> Table:
    """One fit a row, by its facts."""
    table = plain_table("Learned transforms: loss after so many steps", "side", "transform", "loss", "kept")
    for facts in fits:
        found = curve(facts)
        shown = [found[round(i * (len(found) - 1) / (POINTS - 1))] for i in range(POINTS)] if found else []
        text = "  ".join(f"{steps}: {loss:.5f}" for steps, loss in dict.fromkeys(shown))
        best = kept(facts)
        change = f"{best[1]:.5f} ({best[1] / best[0] - 1:+.0%})" if best and best[0] else "the last"
        what = facts["step"]["kind"] if "step" in facts else f"all of {facts['recipe']!r}, end to end"
        table.add_row(facts.get("side", "both"), what, text, change)
    return table


def learning_line(what: str, seconds: float, peak_bytes: int | None) -> str:
    """Time and memory of learning, in a sentence."""
    memory = f", peak memory of the whole run {size(peak_bytes)}" if peak_bytes else ""
    return f"Learned {what} in {seconds:,.0f} s{memory}."
