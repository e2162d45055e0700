"""What calibration measured, and what learned transforms learned (the loss curve of each), as tables."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich.table import Table

from kvq.report.tables import new_table, number, percent, size

# A token that gets this share of a window's attention, over heads and probes, is called a sink.
SINK_SHARE = 0.2
# Points of a loss curve that a table shows.
POINTS = 5


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
    columns = ("layer", "key max", "key rms", "key mean", "value max", "value rms", "query max", "first token")

    def cells(row: dict[str, Any]) -> tuple[str, ...]:
        key, value, query = (row[name] or {} for name in ("key", "value", "query"))
        # Before RoPE, because it turns a constant key into one that changes with its position.
        mean = (row["key_pre"] or row["key"] or {}).get("mean_share")
        return (
            str(row["layer"]),
            *(number(key.get(name), 2) for name in ("absmax", "rms")),
            percent(mean),
            *(number(value.get(name), 2) for name in ("absmax", "rms")),
            number(query.get("absmax"), 2),
            percent(row["sink_share"]),
            number(row["massive"] and row["massive"]["peak"], 0),
        )

    title = "Keys and queries (after RoPE), values, attention and hidden states by layer"
    return new_table(title, *columns, "hidden max", rows=map(cells, rows))


def token_rows(stats) -> list[dict[str, Any]]:
    """Tokens that are attention sinks or hold massive activations, strongest first.

    kind        ``sink`` (strength: share of attention) or ``massive`` (strength: magnitude).
    positions   first and last position at which it was one.  windows  in how many windows.
    layer       where it was strongest.  channel  of the massive activation, else None.
    """
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for index, layer in stats.layers.items():
        for kind, need in (("sink", "sinks"), ("massive", "massive")):
            if need in layer:
                least = SINK_SHARE if kind == "sink" else layer[need].threshold
                _add_tops(found, kind, index, layer[need].tops, least)
    for (_, token), row in found.items():
        row["text"] = stats.token_texts.get(token)
        row["windows"] = len(row["windows"])
    return sorted(found.values(), key=lambda row: (row["kind"], -row["windows"], -row["strength"]))


def _add_tops(found: dict, kind: str, layer: int, tops, least: float) -> None:
    for window, place in (tops.strength >= least).nonzero().tolist():
        token, position = int(tops.token[window, place]), int(tops.position[window, place])
        strength = float(tops.strength[window, place])
        row = found.setdefault(
            (kind, token),
            {"kind": kind, "token": token, "positions": [position, position], "windows": set(), "strength": 0.0},
        )
        row["positions"] = [min(position, row["positions"][0]), max(position, row["positions"][1])]
        row["windows"].add(int(tops.priority[window]))
        if strength > row["strength"]:
            channel = int(tops.extra[window, place]) if kind == "massive" else None
            row |= {"strength": strength, "layer": layer, "channel": channel}


def tokens_table(rows: list[dict[str, Any]], most: int = 6) -> Table:
    """Rows of ``token_rows``, so many of each kind."""
    shown = []
    for kind in ("sink", "massive"):
        for row in [row for row in rows if row["kind"] == kind][:most]:
            first, last = row["positions"]
            shown.append(
                (
                    repr(row["text"]) if row["text"] is not None else str(row["token"]),
                    kind if row["channel"] is None else f"{kind}, channel {row['channel']}",
                    str(first) if first == last else f"{first} to {last}",
                    str(row["windows"]),
                    percent(row["strength"]) if kind == "sink" else number(row["strength"], 0),
                    str(row["layer"]),
                )
            )
    columns = ("token", "kind", "positions", "windows", "strongest", "layer")
    return new_table("Attention sinks and massive activations", *columns, rows=shown)


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
    rows = []
    for facts in fits:
        found = curve(facts)
        shown = [found[round(i * (len(found) - 1) / (POINTS - 1))] for i in range(POINTS)] if found else []
        text = "  ".join(f"{steps}: {loss:.5f}" for steps, loss in dict.fromkeys(shown))
        best = kept(facts)
        change = f"{best[1]:.5f} ({best[1] / best[0] - 1:+.0%})" if best and best[0] else "the last"
        what = facts["step"]["kind"] if "step" in facts else f"all of {facts['recipe']!r}, end to end"
        rows.append((facts.get("side", "both"), what, text, change))
    title = "Learned transforms: loss after so many steps"
    return new_table(title, "side", "transform", "loss", "kept", rows=rows)


def learning_line(what: str, seconds: float, peak_bytes: int | None) -> str:
    """Time and memory of learning, in a sentence."""
    memory = f", peak memory of the whole run {size(peak_bytes)}" if peak_bytes else ""
    return f"Learned {what} in {seconds:,.0f} s{memory}."
