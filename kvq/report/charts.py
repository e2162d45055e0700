"""The charts of a report, from results as plain data. A chart that has nothing to show is None."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from kvq.report.drawing import COLOURS, SERIES, heat_map, hint, limits, log_scale, new_chart, place_labels, styled, svg
from kvq.report.rows import LABELS, metrics_of, sizes_of
from kvq.report.verdict import pareto

Result = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A drawing, what it shows, and how to read it."""

    title: str
    svg: Markup
    caption: str = ""


def charts_of(names: Sequence[str], results: Sequence[Result]) -> list[Chart]:
    """Charts across results; ``names`` are theirs, in the order of the colours."""
    made = (
        bits_against_kl(names, results),
        bits_against_score(names, results),
        by_position(names, results),
        by_layer(names, results),
    )
    return [chart for chart in made if chart is not None]


@styled
def bits_against_kl(names: Sequence[str], results: Sequence[Result]) -> Chart | None:
    """Size against error: the lower left is good. Needs two results that quantize."""
    sizes = sizes_of(results)
    points = [(series, sizes[series].bits, own) for series, own in _divergences(results, "kl").items()]
    if len(points) < 2:
        return None
    figure, axes = new_chart(f"bits per element at {sizes[0].tokens:,} tokens", "KL from baseline, nats a token")
    axes.set_xlim(limits([bits for _, bits, _ in points]))
    log_scale(axes.yaxis, limits([found["kl"] for _, _, found in points], log=True))
    front = pareto(sorted((bits, found["kl"], names[series]) for series, bits, found in points))
    axes.plot(*list(zip(*front))[:2], "--", color=COLOURS["soft"], lw=1.2)
    for series, bits, found in points:
        said = f"{names[series]}: {bits:.2f} bits, KL {found['kl']:.4f}"
        _point(axes, bits, found["kl"], series, said, found["kl_stderr"])
    labels = [(bits, found["kl"], names[series], _colour(series)) for series, bits, found in points]
    place_labels(axes, labels)
    return Chart(
        title="Size against error",
        svg=svg(figure, "Bits per element against KL from the baseline"),
        caption="Lower and further left is better. The dashed line joins what nothing else beats in both.",
    )


def _divergences(results: Sequence[Result], part: str) -> dict[int, Mapping[str, Any]]:
    """Divergences that have this part, by the number of the result."""
    found = {series: result["results"].get("divergence") for series, result in enumerate(results)}
    return {series: own for series, own in found.items() if own and own[part]}


def _colour(series: int) -> str:
    return SERIES[series % len(SERIES)]


def _point(axes, x: float, y: float, series: int, said: str, error: float | None = None) -> None:
    """A mark with what the page says of it, and a bar of two standard errors to both sides."""
    if error is not None:
        # A logarithmic axis has no 0.
        axes.vlines(x, max(y - 2 * error, 1e-12), y + 2 * error, color=_colour(series), lw=1.5, alpha=0.75)
    (mark,) = axes.plot(x, y, "o", color=_colour(series), ms=9, mec=COLOURS["card"], mew=1.5, zorder=3)
    hint(mark, said)


@styled
def bits_against_score(names: Sequence[str], results: Sequence[Result]) -> Chart | None:
    """Size against the mean score over tasks that all results have, beside the baseline's. Needs two results."""
    shared = _shared_shares(results)
    if not shared or len(results) < 2:
        return None

    def mean(result: Result, side: str) -> float:
        return sum(result["results"][task][metric][side] for task, metric in shared) / len(shared)

    means = [(mean(result, "value"), mean(result, "baseline")) for result in results]
    values = [100 * value for pair in means for value in pair]
    sizes = sizes_of(results)
    bits = [size.bits for size in sizes]
    figure, axes = new_chart(f"bits per element at {sizes[0].tokens:,} tokens", "mean score, %")
    axes.set(xlim=limits([*bits, 16.0]), ylim=limits(values))
    axes.axhline(100 * means[0][1], color=COLOURS["soft"], lw=1.2, dashes=(5, 4))
    for series, (value, _) in enumerate(means):
        said = f"{names[series]}: {bits[series]:.2f} bits, mean score {value:.1%}"
        _point(axes, bits[series], 100 * value, series, said)
    place_labels(axes, [(bits[i], 100 * value, names[i], _colour(i)) for i, (value, _) in enumerate(means)])
    tasks = ", ".join(dict.fromkeys(task for task, _ in shared))
    return Chart(
        title="Size against score",
        svg=svg(figure, "Bits per element against the mean score"),
        caption=f"Mean of the main scores of {tasks}. The line is the baseline's. Errors are in the table.",
    )


def _shared_shares(results: Sequence[Result]) -> list[tuple[str, str]]:
    """(task, main metric) of the scores in 0 to 1 that every result has, and whose baseline can do the task."""
    found = []
    for task, own in results[0]["results"].items():
        metrics = metrics_of(own)
        if not metrics or own.get("weak"):
            continue
        metric = next(iter(metrics))
        every = [metrics_of(result["results"].get(task, {})).get(metric) for result in results]
        if all(every) and all(m["higher_is_better"] and 0 <= m["value"] <= 1 for m in every):
            found.append((task, metric))
    return found


@styled
def by_position(names: Sequence[str], results: Sequence[Result]) -> Chart | None:
    found = _divergences(results, "positions")
    rows = {series: [row for row in own["positions"] if row["kl"] > 1e-6] for series, own in found.items()}
    rows = {series: own for series, own in rows.items() if own}
    if not rows:
        return None
    every = [row for own in rows.values() for row in own]
    buckets = sorted({row["last"] for row in every})
    place = {last: i for i, last in enumerate(buckets)}
    figure, axes = new_chart("position in the window, tokens", "KL, nats a token")
    axes.set_xlim(-0.5, len(buckets) - 0.5)
    axes.set_xticks(range(len(buckets)), [f"<{last + 1}" for last in buckets])
    log_scale(axes.yaxis, limits([row["kl"] for row in every], log=True))
    for series, own in rows.items():
        axes.plot([place[row["last"]] for row in own], [row["kl"] for row in own], color=_colour(series), lw=2)
        for row in own:
            said = f"{names[series]}, tokens {row['first']} to {row['last']}: KL {row['kl']:.4f}"
            said = f"{said}, {row['cached']:.0%} read quantized tokens"
            _point(axes, place[row["last"]], row["kl"], series, said, row["kl_stderr"])
    return Chart(
        title="Error by position",
        svg=svg(figure, "KL by position"),
        caption="Buckets double in width. Positions that the recipe keeps exact have no error and are left out.",
    )


@styled
def by_layer(names: Sequence[str], results: Sequence[Result]) -> Chart | None:
    rows = {series: own["layers"] for series, own in _divergences(results, "layers").items()}
    if not rows:
        return None
    every = [row for own in rows.values() for row in own]
    figure, axes = new_chart("layer", "error of the attention output, %")
    axes.set_xlim(limits([row["layer"] for row in every]))
    axes.set_ylim(limits([100 * row["error"] for row in every], zero=True))
    axes.locator_params(axis="x", integer=True)
    for series, own in rows.items():
        axes.plot([row["layer"] for row in own], [100 * row["error"] for row in own], color=_colour(series), lw=2)
        for row in own:
            said = f"{names[series]}, layer {row['layer']}: {row['error']:.1%}"
            _point(axes, row["layer"], 100 * row["error"], series, said)
    return Chart(
        title="Error by layer",
        svg=svg(figure, "Error of the attention output by layer"),
        caption="Relative error that each layer's attention takes from its own quantized keys and values.",
    )


def needle_maps(names: Sequence[str], results: Sequence[Result]) -> list[Chart]:
    """Heat maps of the needle task: the baseline's first, then every result's."""
    found = [(name, result["results"].get("needle", {}), 0) for name, result in zip(names, results)]
    found = [own for own in found if own[1].get("cells")]
    return [_needle_map(*own) for own in [("baseline", found[0][1], 1), *found]] if found else []


def _needle_map(name: str, found: Mapping[str, Any], side: int) -> Chart:
    shares = {
        (own["labels"]["depth"], own["labels"]["length"]): own["metrics"]["choice"][side] for own in found["cells"]
    }
    depths, lengths = (sorted(set(own)) for own in zip(*shares))
    grid = [[shares.get((depth, length)) for length in lengths] for depth in depths]
    drawn = heat_map(
        [f"{depth:.0%}" for depth in depths],
        [f"{length:,}" for length in lengths],
        grid,
        f"Needles that {name} finds",
        row_label="depth",
        column_label="tokens",
        text=lambda value: f"{value:.0%}",
        level=lambda value: value,
        hints=lambda r, c: f"depth {depths[r]:.0%}, {lengths[c]:,} tokens: {grid[r][c]:.0%} found",
    )
    questions = max(cell["questions"] for cell in found["cells"])
    caption = f"{LABELS['choice'].capitalize()}; {questions} asked a cell."
    return Chart(title=name, svg=drawn, caption=caption)


def head_maps(names: Sequence[str], results: Sequence[Result]) -> list[Chart]:
    """Error of the attention output by layer and query head."""
    found = {names[series]: own["layers"] for series, own in _divergences(results, "layers").items()}
    worst = max((error for layers in found.values() for row in layers for error in row["heads"]), default=0.0)
    return [_head_map(name, layers, worst) for name, layers in found.items()]


def _head_map(name: str, layers: Sequence[Mapping[str, Any]], worst: float) -> Chart:
    heads = len(layers[0]["heads"])
    drawn = heat_map(
        [str(row["layer"]) for row in layers],
        [str(head) if heads <= 16 or head % 4 == 0 else "" for head in range(heads)],
        [row["heads"] for row in layers],
        f"Error by layer and head of {name}",
        row_label="layer",
        column_label="query head",
        level=lambda value: 1 - value / worst,
        hints=lambda r, c: f"layer {layers[r]['layer']}, head {c}: {layers[r]['heads'][c]:.1%}",
        cell=(26 if heads <= 16 else 14, 15),
    )
    return Chart(title=name, svg=drawn, caption=f"Red is the worst of all: {worst:.0%}.")
