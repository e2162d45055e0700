"""The Pareto front of a search (bits against damage) and the damage by layer, as a figure and a page. Plain data in."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from kvq.report.drawing import COLOURS, SERIES, new_figure, styled, svg
from kvq.report.page import render

_LABELS = {"kl": "KL to the exact model (nats a token)", "top1": "share of changed top-1 tokens"}


@styled
def pareto_figure(data: Mapping[str, Any]) -> Figure:
    """Draw ``kvq.searching.search_evidence.front_rows`` data. Measured points are filled, predictions a dashed line."""
    figure = new_figure(691, 605)
    upper, lower = figure.subplots(2, 1, height_ratios=(3, 2))
    _draw_front(upper, data)
    _draw_layers(lower, data["layers"])
    return figure


def _damage(measured: Mapping[str, Any], metric: str) -> float:
    return measured["kl"] if metric == "kl" else 1 - measured["top1"]


def _draw_front(axes, data: Mapping[str, Any]) -> None:
    metric = data["metric"]
    searched = sorted([*data["front"], *data["points"]], key=lambda row: row["bits"])
    axes.plot(
        [row["bits"] for row in searched],
        [row["predicted"] for row in searched],
        "--",
        color=COLOURS["soft"],
        label="predicted (sum of single layers), not measured",
    )
    _scatter(axes, data["uniform"], metric, "s", SERIES[1], "measured: best uniform recipes")
    _scatter(axes, data["front"], metric, "o", SERIES[0], "measured: mixed precision")
    _scatter(axes, data["points"], metric, "*", SERIES[6], "measured: chosen", size=150)
    for row in data["points"]:
        where = (row["bits"], _damage(row["measured"], metric))
        axes.annotate(row["name"], where, xytext=(6, 6), textcoords="offset points")
    axes.set_yscale("log")
    axes.set_xlabel("bits per element")
    axes.set_ylabel(_LABELS[metric])
    axes.set_title(f"{data['model']}: mixed precision on unseen parts of {data['text']}")
    axes.grid(True, which="both")
    axes.legend()


def _scatter(axes, rows: Sequence[Mapping[str, Any]], metric: str, marker: str, color: str, label: str, size: int = 36):
    rows = [row for row in rows if row["measured"]]
    if rows:
        xs, ys = [row["bits"] for row in rows], [_damage(row["measured"], metric) for row in rows]
        axes.scatter(xs, ys, marker=marker, s=size, color=color, label=label, zorder=3)


def _draw_layers(axes, layers: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    for shift, (side, color) in zip((-0.2, 0.2), (("key", SERIES[3]), ("value", SERIES[2]))):
        rows = layers[side]
        axes.bar([r["layer"] + shift for r in rows], [r["damage"] for r in rows], 0.4, color=color, label=f"{side}s")
    axes.set_yscale("log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("layer")
    axes.set_ylabel("damage of that layer alone")
    axes.set_title("Sensitivity: one side of one layer at its smallest measured option")
    axes.grid(True, axis="y")
    axes.legend()


def pareto_page(data: Mapping[str, Any], figure: Figure) -> str:
    """The figure, and a table of every measured point."""
    kinds = (("chosen", "points"), ("mixed precision", "front"), ("uniform", "uniform"))
    rows = [(kind, row) for kind, name in kinds for row in data[name]]
    return render(
        "search.html.j2",
        brand="kvq search",
        title=f"Mixed precision for {data['model']}",
        bits_of=data["bits_of"],
        picture=svg(figure, "Bits against damage of every recipe, and damage by layer"),
        rows=[(kind, row["name"], _cells(row)) for kind, row in sorted(rows, key=lambda item: -item[1]["bits"])],
    )


def _cells(row: Mapping[str, Any]) -> list[str]:
    measured = row["measured"]
    error = "" if measured["kl_stderr"] is None else f"{measured['kl_stderr']:.5f}"
    kl, top1 = f"{measured['kl']:.5f}", f"{measured['top1']:.4f}"
    return [f"{row['bits']:.3f}", kl, error, top1, f"{row['predicted']:.5f}"]
