"""The charts of a report, from results as plain data. A chart that has nothing to show is None."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvq.report.rows import LABELS, metrics_of
from kvq.report.svg import Axis, Plot, heat_map

Result = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A drawing, what it shows, and how to read it."""

    title: str
    svg: str
    caption: str = ""
    legend: bool = True


def charts_of(names: Sequence[str], results: Sequence[Result]) -> list[Chart]:
    """Charts across results; ``names`` are theirs, in the order of the colours."""
    made = (
        bits_against_kl(names, results),
        bits_against_score(names, results),
        by_position(names, results),
        by_layer(names, results),
    )
    return [chart for chart in made if chart is not None]


def bits_against_kl(names: Sequence[str], results: Sequence[Result]) -> Chart | None:
    """Size against error: the lower left is good. Needs two results that quantize."""
    points = [
        (series, result["bits_per_element"], found)
        for series, result in enumerate(results)
        if (found := result["results"].get("divergence")) and found["kl"] > 0
    ]
    if len(points) < 2:
        return None
    kls = [found["kl"] for _, _, found in points]
    plot = Plot(
        Axis.around([bits for _, bits, _ in points], "bits per element, measured"),
        Axis.around(kls, "KL from baseline, nats a token", log=True),
        "Bits per element against KL from the baseline",
    )
    front = _front([(bits, found["kl"]) for _, bits, found in points])
    plot.line(front, 0, dashed=True)
    for series, bits, found in points:
        error = found["kl_stderr"]
        if error is not None:
            plot.interval(bits, max(found["kl"] - 2 * error, 1e-12), found["kl"] + 2 * error, series)
        plot.point(bits, found["kl"], series, f"{names[series]}: {bits:.2f} bits, KL {found['kl']:.4f}", names[series])
    return Chart(
        title="Size against error",
        svg=plot.svg(),
        caption="Lower and further left is better. The dashed line joins what nothing else beats in both.",
        legend=False,
    )


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points that no other one beats in both numbers, by the first."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def bits_against_score(names: Sequence[str], results: Sequence[Result]) -> Chart | None:
    """Size against the mean score over tasks that all results have, beside the baseline's. Needs two results."""
    shared = _shared_shares(results)
    if not shared or len(results) < 2:
        return None
    means = [
        (
            sum(result["results"][task][metric]["value"] for task, metric in shared) / len(shared),
            sum(result["results"][task][metric]["baseline"] for task, metric in shared) / len(shared),
        )
        for result in results
    ]
    values = [100 * value for pair in means for value in pair]
    bits = [result["bits_per_element"] for result in results]
    plot = Plot(
        Axis.around([*bits, 16.0], "bits per element, measured"),
        Axis.around(values, "mean score, %"),
        "Bits per element against the mean score",
    )
    plot.level(100 * means[0][1])
    for series, (value, _) in enumerate(means):
        hint = f"{names[series]}: {bits[series]:.2f} bits, mean score {value:.1%}"
        plot.point(bits[series], 100 * value, series, hint, names[series])
    tasks = ", ".join(dict.fromkeys(task for task, _ in shared))
    return Chart(
        title="Size against score",
        svg=plot.svg(),
        caption=f"Mean of the main scores of {tasks}. The line is the baseline's. Errors are in the table.",
        legend=False,
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


def by_position(names: Sequence[str], results: Sequence[Result]) -> Chart | None:
    rows = {
        series: [row for row in found["positions"] if row["kl"] > 1e-6]
        for series, result in enumerate(results)
        if (found := result["results"].get("divergence"))
    }
    rows = {series: own for series, own in rows.items() if own}
    if not rows:
        return None
    every = [row for own in rows.values() for row in own]
    buckets = sorted({row["last"] for row in every})
    place = {last: i for i, last in enumerate(buckets)}
    plot = Plot(
        Axis(
            low=-0.5,
            high=len(buckets) - 0.5,
            label="position in the window, tokens",
            text=lambda place: f"<{buckets[round(place)] + 1}",
        ),
        Axis.around([row["kl"] for row in every], "KL, nats a token", log=True),
        "KL by position",
        x_ticks=range(len(buckets)),
    )
    for series, own in rows.items():
        plot.line([(place[row["last"]], row["kl"]) for row in own], series)
        for row in own:
            if row["kl_stderr"] is not None:
                low, high = row["kl"] - 2 * row["kl_stderr"], row["kl"] + 2 * row["kl_stderr"]
                plot.interval(place[row["last"]], max(low, 1e-12), high, series)
            hint = f"{names[series]}, tokens {row['first']} to {row['last']}: KL {row['kl']:.4f}"
            plot.point(place[row["last"]], row["kl"], series, f"{hint}, {row['cached']:.0%} read quantized tokens")
    return Chart(
        title="Error by position",
        svg=plot.svg(),
        caption="Buckets double in width. Positions that the recipe keeps exact have no error and are left out.",
    )


def by_layer(names: Sequence[str], results: Sequence[Result]) -> Chart | None:
    rows = {
        series: found["layers"]
        for series, result in enumerate(results)
        if (found := result["results"].get("divergence")) and found["layers"]
    }
    if not rows:
        return None
    every = [row for own in rows.values() for row in own]
    plot = Plot(
        Axis.around([row["layer"] for row in every], "layer"),
        Axis.around([100 * row["error"] for row in every], "error of the attention output, %", zero=True),
        "Error of the attention output by layer",
    )
    for series, own in rows.items():
        plot.line([(row["layer"], 100 * row["error"]) for row in own], series)
        for row in own:
            hint = f"{names[series]}, layer {row['layer']}: {row['error']:.1%}"
            plot.point(row["layer"], 100 * row["error"], series, hint)
    return Chart(
        title="Error by layer",
        svg=plot.svg(),
        caption="Relative error that each layer's attention takes from its own quantized keys and values.",
    )


def needle_maps(names: Sequence[str], results: Sequence[Result]) -> list[Chart]:
    """Heat maps of the needle task: the baseline's first, then every result's."""
    found = [(name, result["results"]["needle"]) for name, result in zip(names, results) if _has_cells(result)]
    if not found:
        return []
    maps = [_needle_map("baseline", found[0][1], 1)]
    return maps + [_needle_map(name, own, 0) for name, own in found]


def _has_cells(result: Result) -> bool:
    return bool(result["results"].get("needle", {}).get("cells"))


def _needle_map(name: str, found: Mapping[str, Any], side: int) -> Chart:
    cells = {(cell["labels"]["depth"], cell["labels"]["length"]): cell for cell in found["cells"]}
    depths = sorted({depth for depth, _ in cells})
    lengths = sorted({length for _, length in cells})
    grid = [[_share(cells.get((depth, length)), side) for length in lengths] for depth in depths]
    svg = heat_map(
        [f"{depth:.0%}" for depth in depths],
        [f"{length:,}" for length in lengths],
        grid,
        f"Needles that {name} finds",
        row_label="depth",
        column_label="tokens",
        text=lambda value: f"{value:.0%}",
        level=lambda value: value,
        hint=lambda r, c: f"depth {depths[r]:.0%}, {lengths[c]:,} tokens: {grid[r][c]:.0%} found",
    )
    questions = max(cell["questions"] for cell in cells.values())
    caption = f"{LABELS['choice'].capitalize()}; {questions} asked a cell."
    return Chart(title=name, svg=svg, caption=caption, legend=False)


def _share(cell: Mapping[str, Any] | None, side: int) -> float | None:
    return None if cell is None else cell["metrics"]["choice"][side]


def head_maps(names: Sequence[str], results: Sequence[Result]) -> list[Chart]:
    """Error of the attention output by layer and query head."""
    found = [
        (name, own["layers"])
        for name, result in zip(names, results)
        if (own := result["results"].get("divergence")) and own["layers"]
    ]
    if not found:
        return []
    worst = max(error for _, layers in found for row in layers for error in row["heads"])
    return [_head_map(name, layers, worst) for name, layers in found]


def _head_map(name: str, layers: Sequence[Mapping[str, Any]], worst: float) -> Chart:
    heads = len(layers[0]["heads"])
    svg = heat_map(
        [str(row["layer"]) for row in layers],
        [str(head) if heads <= 16 or head % 4 == 0 else "" for head in range(heads)],
        [row["heads"] for row in layers],
        f"Error by layer and head of {name}",
        row_label="layer",
        column_label="query head",
        text=lambda value: f"{value:.0%}",
        level=lambda value: 1 - value / worst,
        hint=lambda r, c: f"layer {layers[r]['layer']}, head {c}: {layers[r]['heads'][c]:.1%}",
        cell=(26 if heads <= 16 else 14, 15),
        show=False,
    )
    return Chart(title=name, svg=svg, caption=f"Red is the worst of all: {worst:.0%}.", legend=False)
